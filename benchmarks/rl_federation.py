"""A federation whose nodes learn from verifiers, at their own pace, beside one learner of all.

In: the quickstart's base model (trained at the first run). Out: figures; with `--json` one object
as the last line: `success[who][after][environment]` in percent of held-out tasks of the release.
Three companies write words as they are, each in a key style of its own; the base rarely takes the
right one, and only the company's name tells which it is. Each has a node. A round is a node's own
(edge_node.learning): GRPO with rollouts from a vLLM, and the local gate. Nodes A and B finish a
round at every merge; C is four times slower: its round starts from the release of four merges ago,
and nobody waits for it. Central's merge is the default rule. The centralised learner has all three
environments, and after as many answers as the federation's nodes sampled together it is done.

Simulated: time, the wire and central's gate. One vLLM serves all nodes, one after the other.

Run: `python -m benchmarks.rl_federation [--json] [--seed 0]`; about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import describe_machine
from benchmarks.rl import MAX_TOKENS, Releases, serving
from benchmarks.rules.__main__ import product_mean
from edge_node.environments import EnvironmentProcess
from edge_node.episodes import read_rules
from edge_node.learning.plans import plan_round
from edge_node.learning.records import NoGain
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from examples.quickstart import house
from examples.quickstart.environments import ToolApi
from examples.quickstart.model import build_base
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors
from protos.manifest import ReleaseManifest

TASKS = 60
MERGES = 8
SLOW = 4
STEPS, PROMPTS, SAMPLES = 8, 8, 8
"""Of a round."""
SHARE = 0.9
"""Of the centralised gain."""
NODES: Mapping[str, int] = {"A": 1, "B": 1, "C": SLOW}
"""Merges that a round takes."""
STYLES = {"A": 0, "B": 1, "C": 2}
COMPANIES = {"A": "juno", "B": "vega", "C": "mira"}


class Explored(ToolApi):
    """One company that writes words as they are, in the key style of its node."""

    def __init__(self, node: str, seed: int = 0) -> None:
        company = COMPANIES[node]
        vocabulary = house.Vocabulary(
            house.SERVICES[0:4],
            ("merge", "hold", "open", "move"),
            ("lyon", "quito", "oslo", "perth"),
            ("low",),
        )
        super().__init__(
            f"{company}-{node.lower()}",
            {company: house.raw_house(company, STYLES[node])},
            {company: vocabulary},
            seed,
        )


@dataclass(frozen=True)
class Release:
    manifest: ReleaseManifest
    folder: Path
    name: str
    tensors: LoraTensors


class Federation:
    """One vLLM, the environments, and releases after each other."""

    def __init__(
        self,
        settings: EdgeSettings,
        base: BaseModelInfo,
        seed: int,
        releases: Releases,
        evaluator: Evaluator,
    ) -> None:
        self._settings, self._base, self._seed = settings, base, seed
        self._releases, self._evaluator = releases, evaluator
        self.no_gain: list[str] = []
        self.answers = 0

    async def put(self, tensors: LoraTensors) -> Release:
        name = await self._releases.put(tensors)
        return Release(self._releases.manifest, self._releases.folder, name, tensors)

    async def success(self, release: Release) -> dict[str, float]:
        """Percent of held-out tasks by node."""
        found = {}
        for node in NODES:
            result = await self._evaluator.compare(
                node, release.name, release.name, 0, TASKS, Sampling()
            )
            found[node] = 100 * result.both_passed / TASKS
        return found

    async def train(
        self, nodes: Sequence[str], number: int, start: Release, workspace: Path
    ) -> LoraTensors | None:
        """The increment of one round on these nodes' environments; None: the local gate said no."""
        from edge_node.learning.exploration import train_on_verifiers
        from edge_node.learning.workplace import find_workplace

        specs = [spec for spec in self._settings.environments if spec.name in nodes]
        settings = self._settings.model_copy(update={"environments": specs})
        plan = plan_round(
            settings.learning.model_copy(update={"seed": self._seed * 1000 + number}),
            number=number, node_id="-".join(nodes), release=start.manifest, cursor=0,
            max_rank=None, method="grpo", explored=list(nodes),
        )  # fmt: skip
        workspace.mkdir(parents=True)
        self.answers += STEPS * PROMPTS * SAMPLES
        try:
            place = find_workplace(plan, settings, start.folder, workspace)
            trained = await asyncio.to_thread(train_on_verifiers, plan, settings, place)
        except NoGain as error:
            self.no_gain.append(f"{'+'.join(nodes)} {number}: {error}")
            return None
        return trained.tensors


async def federate(federation: Federation, merges: int, folder: Path) -> dict[str, Any]:
    """Every node at its own pace; a merge has whatever has come by then."""
    releases = [await federation.put(LoraTensors())]
    success = {"0": await federation.success(releases[0])}
    for number in range(1, merges + 1):
        new = []
        for node, takes in NODES.items():
            if number % takes == 0:
                increment = await federation.train(
                    [node], number, releases[number - takes], folder / f"{node}-{number}"
                )
                new += [increment] if increment is not None else []
        merged = product_mean(releases[-1].tensors, new).tensors if new else releases[-1].tensors
        releases.append(await federation.put(merged))
        success[str(number)] = await federation.success(releases[-1])
        print(f"federation, merge {number}: {success[str(number)]}", file=sys.stderr)
    return success


async def centralise(federation: Federation, answers: int, folder: Path) -> dict[str, Any]:
    """One learner with all environments, until it has sampled so many answers."""
    release = await federation.put(LoraTensors())
    success, number = {"0": await federation.success(release)}, 0
    while federation.answers < answers:
        number += 1
        increment = await federation.train(list(NODES), number, release, folder / f"all-{number}")
        if increment is not None:
            release = await federation.put(product_mean(release.tensors, [increment]).tensors)
        if increment is not None or federation.answers >= answers:
            success[str(number)] = await federation.success(release)
        print(f"centralised, round {number}: {success.get(str(number))}", file=sys.stderr)
    return success


async def run(folder: Path, cache: Path, seed: int, merges: int) -> dict[str, Any]:
    base = read_base_model(await asyncio.to_thread(build_base, cache))
    settings = EdgeSettings.model_validate(
        {
            "data_dir": folder,
            "base": {"path": base.path},
            "serving": {"port": free_port(), "max_model_len": 256, "max_cpu_loras": 64},
            "environments": [
                {
                    "name": node, "factory": "benchmarks.rl_federation:Explored",
                    "options": {"node": node}, "rollouts": True,
                }
                for node in NODES
            ],
            "learning": {
                "seed": seed,
                "grpo": {
                    "max_answer_tokens": MAX_TOKENS, "steps": STEPS, "prompts": PROMPTS,
                    "samples": SAMPLES,
                },
            },
        }
    )  # fmt: skip
    async with AsyncExitStack() as held:
        environments = {
            spec.name: (spec, held.enter_context(EnvironmentProcess(spec)).environment)
            for spec in settings.environments
        }
        control = await held.enter_async_context(serving(settings, base))
        evaluator = Evaluator(
            control.requests, environments, seed, MAX_TOKENS,
            partial(read_rules, settings, base.path, MAX_TOKENS),
        )  # fmt: skip
        releases = Releases(settings, base, control)
        together = Federation(settings, base, seed, releases, evaluator)
        federated = await federate(together, merges, folder / "rounds")
        alone = Federation(settings, base, seed, releases, evaluator)
        centralised = await centralise(alone, together.answers, folder / "rounds")
    success = {"federation": federated, "centralised": centralised}
    return {
        "success": success,
        "answers": {"federation": together.answers, "centralised": alone.answers},
        "no_gain": {"federation": together.no_gain, "centralised": alone.no_gain},
        "takes": dict(NODES),
        "held_out_tasks": TASKS,
        "bars": bars(success),
    }


def bars(success: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, bool]:
    """The last release against the centralised learner's best."""
    before = mean(success["federation"]["0"].values())
    last = list(success["federation"].values())[-1]
    best = max(mean(found.values()) for found in success["centralised"].values())
    return {
        f"the last release has {SHARE:.0%} of the centralised gain": mean(last.values()) - before
        >= SHARE * (best - before),
        "the slow node's environment gained": last["C"] > success["federation"]["0"]["C"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rl_federation", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--merges", type=int, default=MERGES)
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    options = parser.parse_args()
    machine, begun = describe_machine(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        result = asyncio.run(run(Path(folder), options.cache, options.seed, options.merges))
    for name, held in result["bars"].items():
        print(f"{'holds' if held else 'FAILS'}: {name}", file=sys.stderr)
    if options.json:
        wall_s = round(time.monotonic() - begun, 1)
        print(json.dumps(result | {"seed": options.seed, "wall_s": wall_s, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
