"""Which merge rule needs the fewest rounds, on the quickstart's problem: `python -m benchmarks.rules --seed 0 --rounds 4`.

In: a seed, rules, a number of rounds. Out: progress on stderr and, with --json, one JSON object as the last line of stdout: success
in percent per rule and round on 100 held-out tasks each of A, B, C (same company, never trained) and the public anchor.

Real are the base model, the tasks, a node's round (edge_node.learning with the quickstart's recipe, sketches of rank 16) and the
merge (central.merging). Simulated is the rest: nodes A and B train one after the other on tasks with known answers, 400 before the
first round and 100 more before each further one, every round is merged, and there is no gate.
About a minute of one core per rule and round.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import describe_machine  # first: it limits BLAS to one thread
from central.merging import Merged, ProductSum, merge, regmean
from edge_node.environments import Task
from edge_node.learning.batches import Lesson
from edge_node.learning.records import plan_round
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import LearningSettings
from examples.quickstart.environments import CompanyApi, Node, PublicTenants, ToolApi
from examples.quickstart.model import build_base
from examples.quickstart.recipe import FIRST_WAVE, LEARNING, NEXT_WAVE
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex

RANK, SKETCH_RANK, TASKS = 32, 16, 100
LEARNERS = ("A", "B")
Rule = Callable[[LoraTensors, Sequence[LoraTensors]], Merged]


def product_mean(parent: LoraTensors, updates: Sequence[LoraTensors]) -> Merged:
    """central's default."""
    return merge(parent, [(u, 1 / len(updates)) for u in updates], rank=RANK, server_step=1.0, seed=0)


def regmean_with(eps: float) -> Rule:
    """The rule regmean, as central/federation/regmean.py merges."""

    def rule(parent: LoraTensors, updates: Sequence[LoraTensors]) -> Merged:
        total = ProductSum(rank=RANK, seed=0, streamed=False)
        total.add(parent, 1.0)
        total.add(regmean([(u, 1 / len(updates)) for u in updates], eps=eps), 1.0)
        return total.result()

    return rule


RULES: Mapping[str, Rule] = {
    "product-mean": product_mean,
    "regmean-0.1": regmean_with(0.1),
    "regmean-0.3": regmean_with(0.3),
    "regmean-1": regmean_with(1.0),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rules", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/quickstart"), help="where the tiny base model is kept"
    )
    options = parser.parse_args(arguments)
    world = World(build_base(options.cache), options.seed)
    first: list[LoraTensors] = []
    success: dict[str, list[dict[str, int]]] = {}
    start = time.process_time()
    for rule in options.rules:
        parent, success[rule] = LoraTensors(), []
        for number in range(1, options.rounds + 1):
            updates = [world.train(node, number, parent) for node in LEARNERS] if number > 1 or not first else first
            first = first or updates  # the first round starts from the base under every rule
            parent = RULES[rule](parent, updates).tensors
            success[rule].append(world.success(parent))
            print(f"seed {options.seed} {rule} round {number}: {success[rule][-1]}", file=sys.stderr, flush=True)
    result = {"success_percent": success, "cpu_s": round(time.process_time() - start, 1), "seed": options.seed}
    if options.json:
        print(json.dumps({**result, "bars": {}, "machine": describe_machine()}), flush=True)


class World:
    """The base model, the environments and what is drawn from them."""

    def __init__(self, base: Path, seed: int) -> None:
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(1)
        self._base: BaseModelInfo = read_base_model(base)
        self._seed = seed
        self._learning = LearningSettings.model_validate(
            {key.removeprefix("EDGE_LEARNING__").lower(): value for key, value in LEARNING.items()}
            | {"seed": seed, "gram_rank": SKETCH_RANK}
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base)
        public = PublicTenants()
        self._anchors = lessons(public, public.tasks("train", count=self._learning.anchor_pool, seed=seed))
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
                own=lessons(company, company.tasks("train", count=met, seed=self._seed)),
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
        self._tokenizer.padding_side = "left"
        texts = [
            self._tokenizer.apply_chat_template(list(task.messages), add_generation_prompt=True, tokenize=False)
            for task in tasks
        ]
        inputs = self._tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, pad_token_id=self._tokenizer.pad_token_id)
        answers: list[str] = self._tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
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


def lessons(environment: ToolApi, tasks: Sequence[Task]) -> list[Lesson]:
    """Tasks with the answers that the environment knows."""
    answers = [(task, environment.reference_answer(task)) for task in tasks]
    return [Lesson(task.messages, answer) for task, answer in answers if answer is not None]


if __name__ == "__main__":
    main()
