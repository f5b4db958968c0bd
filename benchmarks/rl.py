"""How far a node gets by reinforcement learning, with rollouts from its own vLLM.

In: two tiny base models (made in --cache when they are missing, which takes minutes). Out: figures;
with `--json` one object as the last line. The rounds are those of a node (edge_node.learning): no
feedback, no correction, only the verifier. Each round starts from the release before it plus its
increment, as if that alone had been merged.

- E: the quickstart's base and environment E, which writes words as they are, in one of three key
  styles; the base rarely takes that one.
- errands: a task of two tool calls, look up and then act (`examples/errands`). Its base knows the
  calls, and mostly acts on the wrong one of two numbers.
- hackable: one round from the quickstart's base asks a verifier that can be cheated (hackable.py);
  the local gate is to stop it.

Missing: how far other environments get, and against supervised rounds.

Run: `python -m benchmarks.rl [--json] [--world E] [--rounds 3] [--seed 0] [--cache
.cache/quickstart]`; a few minutes a world.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import describe_machine, hackable
from benchmarks.load.servers import node_server
from edge_node.environments import EnvironmentProcess
from edge_node.episodes import read_rules
from edge_node.learning.plans import RoundPlan, plan_round
from edge_node.learning.policies import side_by_side
from edge_node.learning.records import NoGain
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.releases.peft_directory import peft_files
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from examples.errands.base import build_errands_base
from examples.ports import free_port
from examples.quickstart.model import build_base
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex

TASKS = 100
"""Held-out tasks before and after a round."""
ROUNDS = 3
"""Most rounds."""
END = 0.95
"""Success at which no further round is made."""
HACK_BAR = 0.2
"""Reward that the cheating policy is to gain, so that there is something to stop."""
MAX_TOKENS = 64


@dataclass(frozen=True)
class World:
    """bars: name -> whether success before, and at the end, is as it should be."""

    environment: Mapping[str, Any]
    build: Callable[[Path], Path]
    context: int
    grpo: Mapping[str, Any]
    bars: Mapping[str, Callable[[float, float], bool]]
    is_hackable: bool = False
    """One round, whose reward rises although its policy gets worse."""


WORLDS = {
    "E": World(
        environment={
            "name": "juno-e", "factory": "examples.quickstart.environments:CompanyApi",
            "options": {"node": "E"},
        },
        build=build_base,
        context=256,
        grpo={},
        bars={
            "starts_at_most_10_percent": lambda before, after: before <= 0.10,
            "reaches_95_percent": lambda before, after: after >= 0.95,
        },
    ),
    "errands": World(
        environment={"name": "errands", "factory": "examples.errands.environment:Errands"},
        build=build_errands_base,
        context=512,
        grpo={"max_turns": 4, "prompts": 8, "steps": 24, "learning_rate": 4e-3},
        bars={
            "base_solves_10_to_40_percent": lambda before, after: 0.10 <= before <= 0.40,
            "up_by_30_points": lambda before, after: after - before >= 0.30,
        },
    ),
    "hackable": World(
        environment={"name": "hackable", "factory": "benchmarks.hackable:Hackable"},
        build=build_base,
        context=256,
        grpo={"prompts": 8, "steps": 12},
        bars={},
        is_hackable=True,
    ),
}  # fmt: skip


def settings_for(
    world: World, data_dir: Path, base: Path, seed: int, port: int, **grpo: Any
) -> EdgeSettings:
    return EdgeSettings.model_validate(
        {
            "data_dir": data_dir,
            "base": {"path": base},
            "serving": {"port": port, "max_model_len": world.context},
            "environments": [dict(world.environment) | {"rollouts": True}],
            "learning": {
                "seed": seed,
                "grpo": {"max_answer_tokens": MAX_TOKENS} | dict(world.grpo) | grpo,
            },
        }
    )


@asynccontextmanager
async def serving(settings: EdgeSettings, base: BaseModelInfo) -> AsyncIterator[ControlClient]:
    async with node_server(settings, base) as (control, _):
        yield control


class Releases:
    """Releases that central would have made of this node's updates alone."""

    def __init__(self, settings: EdgeSettings, base: BaseModelInfo, control: ControlClient) -> None:
        self._settings = settings
        self._base = base
        self._control = control
        self.tensors = LoraTensors()
        self._version = -1
        self.manifest: ReleaseManifest

    async def add(self, increment: LoraTensors) -> str:
        """Serves this release plus an increment; its name."""
        return await self.put(side_by_side(self.tensors, increment))

    async def put(self, tensors: LoraTensors) -> str:
        """Serves `tensors` as the next release; its name."""
        self.tensors = tensors
        self._version += 1
        payload = encode(self.tensors)
        self.manifest = ReleaseManifest(
            base=self._base.digest, cohort="shared", version=self._version,
            parent=None, plan=None, rank=self.tensors.rank, truncation_error=0.0, updates=[],
            payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            created_at="",
        )  # fmt: skip
        self.folder.mkdir(parents=True)
        for name, data in peft_files(self.tensors, self._base.module_shapes).items():
            (self.folder / name).write_bytes(data)
        name = f"{self._settings.serving.alias}@{self.manifest.label}"
        await self._control.load(name, self.folder)
        await self._control.point(name)
        return name

    @property
    def folder(self) -> Path:
        return self._settings.data_dir / "releases" / "versions" / self.manifest.digest

    def plan(self, number: int) -> RoundPlan:
        return plan_round(
            self._settings.learning, number=number, node_id="benchmark", release=self.manifest,
            cursor=0, max_rank=None, method="grpo",
            explored=[spec.name for spec in self._settings.environments if spec.rollouts],
        )  # fmt: skip


async def run(
    world: World, cache: Path, seed: int, folder: Path, rounds: int = ROUNDS, **grpo: Any
) -> dict[str, Any]:
    """The figures after at most so many rounds; `grpo` overrides settings."""
    from edge_node.learning.exploration import train_on_verifiers
    from edge_node.learning.workplace import find_workplace

    path = await asyncio.to_thread(world.build, cache)
    base = read_base_model(path)
    settings = settings_for(world, folder, path, seed, free_port(), **grpo)
    (spec,) = settings.environments
    done: list[dict[str, Any]] = []
    async with AsyncExitStack() as held:
        process = held.enter_context(EnvironmentProcess(spec))
        control = await held.enter_async_context(serving(settings, base))
        evaluator = Evaluator(
            control.requests,
            {spec.name: (spec, process.environment)},
            seed,
            MAX_TOKENS,
            partial(read_rules, settings, path, MAX_TOKENS),
            control,
        )

        async def success(name: str) -> float:
            result = await evaluator.compare(spec.name, name, name, 0, TASKS, Sampling())
            return result.both_passed / TASKS

        releases = Releases(settings, base, control)
        reached = [await success(await releases.add(LoraTensors()))]
        print(f"before: {reached[0]:.0%}", file=sys.stderr)
        if world.is_hackable:
            return await asyncio.to_thread(_cheat, releases, settings, folder / "round-1")
        while len(done) < rounds and reached[-1] < END:
            number, began = len(done) + 1, time.monotonic()
            workspace = folder / f"round-{number}"
            workspace.mkdir()
            try:
                plan = releases.plan(number)
                place = find_workplace(plan, settings, releases.folder, workspace)
                trained = await asyncio.to_thread(train_on_verifiers, plan, settings, place)
            except NoGain as error:
                done.append({"no_gain": str(error)})
                break
            reached.append(await success(await releases.add(trained.tensors)))
            done.append(trained.metrics | {"wall_s": round(time.monotonic() - began, 1)})
            print(f"round {number}: {reached[-2]:.0%} -> {reached[-1]:.0%}", file=sys.stderr)
    return {
        "held_out_tasks": TASKS,
        "success": reached,
        "rounds": done,
        "settings": settings.learning.grpo.model_dump(),
        "bars": {name: holds(reached[0], reached[-1]) for name, holds in world.bars.items()},
    }


def _cheat(releases: Releases, settings: EdgeSettings, workspace: Path) -> dict[str, Any]:
    cheated = hackable.explore(releases.plan(1), settings, releases.folder, workspace)
    bars = {
        "is_cheated": cheated["reward_last"] > cheated["reward_first"] + HACK_BAR,
        "is_stopped": cheated["stopped"] is not None,
    }
    return {"success": [], "rounds": [cheated], "bars": bars}


def show(name: str, result: dict[str, Any]) -> None:
    table = Table("round", "success on held-out tasks", "seconds", title=name)
    for before in result["success"][:1]:
        table.add_row("before", f"{before:.0%}", "")
    for number, (reached, figures) in enumerate(
        zip(result["success"][1:], result["rounds"], strict=False), 1
    ):
        table.add_row(str(number), f"{reached:.0%}", str(figures["wall_s"]))
    Console(stderr=True).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--world", choices=sorted(WORLDS), help="only this one")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="most rounds of a world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    for name, world in WORLDS.items():
        if options.world in (None, name):
            with tempfile.TemporaryDirectory(prefix="lk-rl-") as folder:
                found[name] = asyncio.run(
                    run(world, options.cache, options.seed, Path(folder), options.rounds)
                )
            show(name, found[name])
    if options.json:
        bars = {
            f"{name}_{bar}": holds
            for name, result in found.items()
            for bar, holds in result.pop("bars").items()
        }
        about = {"bars": bars, "seed": options.seed, "machine": describe_machine()}
        print(json.dumps({"worlds": found} | about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
