"""Which merge rule needs the fewest rounds, on the quickstart's problem: `python -m benchmarks.rules --seed 0 --rounds 4`.

In: a seed, rules, a number of rounds. Out: progress on stderr and, with --json, one JSON object as the last line of stdout: success
in percent per rule and round on 100 held-out tasks each of A, B, C (same company, never trained) and the public anchor.

Real are the base model, the tasks, a node's round (edge_node.learning with the quickstart's recipe, sketches of rank 16) and the
merge (central.merging). Simulated is the rest: nodes A and B train one after the other on tasks with known answers, 400 before the
first round and 100 more before each further one, every round is merged, and there is no gate. With `--slow k` B needs k merges for
a round: it starts from the release of that time, and A's updates are merged without it meanwhile. For the product mean it also says how
far each release is from the sum of all increments, as a multiple of the distance of that sum's best approximation of the same rank.
About a minute of one core per rule and round.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import describe_machine  # first: it limits BLAS to one thread
from central.merging import Merged, ProductSum, merge, regmean
from edge_node.environments import Task
from edge_node.learning.batches import Lesson
from edge_node.learning.records import plan_round
from edge_node.releases.peft_directory import peft_files
from edge_node.rendering import Renderer, load_renderer
from edge_node.settings import LearningSettings
from examples.quickstart.environments import CompanyApi, Node, PublicTenants, ToolApi
from examples.quickstart.model import build_base
from examples.quickstart.recipe import FIRST_WAVE, LEARNING, NEXT_WAVE
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex

RANK, SKETCH_RANK, TASKS = 32, 16, 100


@dataclass(frozen=True)
class Update:
    """An increment with its sketches, and the release that it was trained on."""

    start: LoraTensors
    increment: LoraTensors

    def solution(self) -> LoraTensors:
        """Start plus increment, exact, with the increment's sketches."""
        rank = max(self.start.rank + self.increment.rank, 1)
        whole = merge(self.start, [(self.increment, 1.0)], rank=rank, server_step=1.0, seed=0)
        return LoraTensors(whole.tensors.modules, self.increment.sections)


Rule = Callable[[LoraTensors, Mapping[str, Update], Mapping[str, Update]], Merged]
"""(parent, new updates by node, the latest one of every node) -> the next release."""


def product_mean(parent: LoraTensors, new: Mapping[str, Update], latest: Mapping[str, Update]) -> Merged:
    """central's default."""
    updates = [(update.increment, 1 / len(new)) for update in new.values()]
    return merge(parent, updates, rank=RANK, server_step=1.0, seed=0)


def regmean_with(eps: float) -> Rule:
    """The rule regmean, as central/federation/regmean.py merges."""

    def rule(parent: LoraTensors, new: Mapping[str, Update], latest: Mapping[str, Update]) -> Merged:
        total = ProductSum(rank=RANK, seed=0, streamed=False)
        total.add(parent, 1.0)
        total.add(regmean([(update.increment, 1 / len(new)) for update in new.values()], eps=eps), 1.0)
        return total.result()

    return rule


def resolve_with(eps: float) -> Rule:
    """The same with CENTRAL_MERGE__RESOLVE: the parent counts only as what solutions started from."""

    def rule(parent: LoraTensors, new: Mapping[str, Update], latest: Mapping[str, Update]) -> Merged:
        total = ProductSum(rank=RANK, seed=0, streamed=False)
        total.add(regmean([(update.solution(), 1 / len(latest)) for update in latest.values()], eps=eps), 1.0)
        return total.result()

    return rule


RULES: Mapping[str, Rule] = {
    "product-mean": product_mean,
    "regmean-0.1": regmean_with(0.1),
    "regmean-0.3": regmean_with(0.3),
    "regmean-1": regmean_with(1.0),
    "resolve-0.1": resolve_with(0.1),
    "resolve-1": resolve_with(1.0),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slow", type=int, default=1, metavar="K", help="merges that a round of node B takes")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/quickstart"), help="where the tiny base model is kept"
    )
    options = parser.parse_args(arguments)
    world = World(build_base(options.cache), options.seed)
    first: dict[str, LoraTensors] = {}
    success: dict[str, list[dict[str, int]]] = {}
    over_optimum: list[float] = []
    start = time.process_time()
    for rule in options.rules:
        releases, latest, success[rule], whole = [LoraTensors()], dict[str, Update](), [], Whole()
        for number in range(1, options.rounds + 1):
            new: dict[str, Update] = {}
            for node, takes in (("A", 1), ("B", options.slow)):
                if number % takes:
                    continue
                begun = releases[number - takes]
                known = first.get(node) if number == takes else None
                increment = known or world.train(node, number // takes, begun)
                first.setdefault(node, increment)  # a first round starts from the base under every rule
                new[node] = Update(begun, increment)
            latest |= new
            releases.append(RULES[rule](releases[-1], new, latest).tensors)
            success[rule].append(world.success(releases[-1]))
            print(f"seed {options.seed} {rule} round {number}: {success[rule][-1]}", file=sys.stderr, flush=True)
            if rule == "product-mean":
                whole.add([update.increment for update in new.values()])
                over_optimum.append(whole.over_optimum(releases[-1]))
                print(f"    {over_optimum[-1]} of the optimum's distance", file=sys.stderr, flush=True)
    result = {
        "success_percent": success,
        "product_mean_over_optimum": over_optimum,
        "slow": options.slow,
        "cpu_s": round(time.process_time() - start, 1),
        "seed": options.seed,
    }
    if options.json:
        print(json.dumps({**result, "bars": {}, "machine": describe_machine()}), flush=True)


class Whole:
    """The sum of all that the product mean merged, without truncation: dense, as the tiny base permits."""

    def __init__(self) -> None:
        self._modules: dict[str, npt.NDArray[np.float64]] = {}

    def add(self, increments: Sequence[LoraTensors]) -> None:
        for increment in increments:
            for name, module in increment.modules.items():
                self._modules[name] = self._modules.get(name, 0.0) + dense(module) / len(increments)

    def over_optimum(self, release: LoraTensors) -> float:
        """The release's distance as a multiple of that of the best approximation of rank RANK, over all modules; 1 where both are exact."""
        total = distance = optimum = 0.0
        for name, whole in self._modules.items():
            squares = np.linalg.svd(whole, compute_uv=False) ** 2
            total, optimum = total + squares.sum(), optimum + squares[RANK:].sum()
            distance += np.sum((whole - dense(release.modules[name])) ** 2)
        exact = optimum < 1e-10 * total
        return 1.0 if exact else round(math.sqrt(distance / optimum), 4)


def dense(module: LoraModule) -> npt.NDArray[np.float64]:
    """The module's increment, [out_features, in_features]."""
    return module.scale * (module.B.astype(np.float64) @ module.A.astype(np.float64))


class World:
    """The base model, the environments and what is drawn from them."""

    def __init__(self, base: Path, seed: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._base: BaseModelInfo = read_base_model(base)
        self._seed = seed
        self._learning = LearningSettings.model_validate(
            {key.removeprefix("EDGE_LEARNING__").lower(): value for key, value in LEARNING.items()}
            | {"seed": seed, "gram_rank": SKETCH_RANK}
        )
        self._renderer = load_renderer(base)
        public = PublicTenants()
        self._anchors = lessons(
            self._renderer, public, public.tasks("train", count=self._learning.anchor_pool, seed=seed)
        )
        companies: tuple[Node, ...] = ("A", "B", "C")
        self._companies: dict[str, CompanyApi] = {letter: CompanyApi(letter, seed=seed) for letter in companies}
        environments: dict[str, ToolApi] = {**self._companies, "base": public}
        self._held_out = {
            name: (environment, environment.tasks("held_out", count=TASKS, seed=7))
            for name, environment in environments.items()
        }

    def train(self, node: str, number: int, start: LoraTensors) -> LoraTensors:
        """The update of the node's round `number` from release `start`, with its sketches."""
        from edge_node.learning.training import train_round

        company = self._companies[node]
        met = FIRST_WAVE + NEXT_WAVE * (number - 1)
        plan = plan_round(
            self._learning,
            number=number,
            node_id=f"node-{node}",
            release=self._manifest(start, number - 1),
            cursor=0,
            max_rank=None,
            gram_rank=SKETCH_RANK,
        )
        with tempfile.TemporaryDirectory() as folder:
            release = Path(folder) / "release"
            release.mkdir()
            for name, data in peft_files(start, self._base.module_shapes).items():
                (release / name).write_bytes(data)
            return train_round(
                plan,
                base=self._base.path,
                release=release if start.modules else None,
                own=lessons(self._renderer, company, company.tasks("train", count=met, seed=self._seed)),
                anchors=self._anchors,
                workspace=Path(folder) / "round",
            ).tensors

    def success(self, release: LoraTensors) -> dict[str, int]:
        """Percent of held-out tasks that greedy answers under `release` solve, by environment."""
        import torch
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self._base.path, dtype=torch.float32).eval()
        for name, module in release.modules.items():
            model.get_submodule(name).weight.data += torch.from_numpy(module.scale * (module.B @ module.A))
        found = {}
        for name, (environment, tasks) in self._held_out.items():
            with torch.no_grad():
                answers = self._answers(model, tasks)
            passed = sum(environment.verify(task, answer).passed for task, answer in zip(tasks, answers, strict=True))
            found[name] = round(100 * passed / len(tasks))
        return found

    def _answers(self, model: Any, tasks: Sequence[Task]) -> list[str]:
        tokenizer = self._renderer.tokenizer
        prompts = [self._renderer.prompt_ids(task.messages) for task in tasks]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers: list[str] = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def _manifest(self, release: LoraTensors, version: int) -> ReleaseManifest:
        payload = encode(release)
        return ReleaseManifest(
            base=self._base.digest,
            cohort="benchmark",
            version=version,
            parent=None,
            plan=None,
            payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            rank=release.rank,
            truncation_error=0.0,
            updates=[],
            created_at="",
        )


def lessons(renderer: Renderer, environment: ToolApi, tasks: Sequence[Task]) -> list[Lesson]:
    """Tasks with the answers that the environment knows."""
    answers = [(task, environment.reference_answer(task)) for task in tasks]
    return [
        Lesson(renderer.prompt_ids(task.messages), renderer.answer_ids(answer))
        for task, answer in answers
        if answer is not None
    ]


if __name__ == "__main__":
    main()
