"""What users of a node feel while it learns: their latency with a grpo round beside, and without.

In: the quickstart's base model (trained at the first run). Out: figures; with `--json` one object
as the last line. One node: its vLLM, and its learner in a process of its own, which trains a round
of environment E with rollouts from that vLLM. Users arrive at random (Poisson) and ask for streams
of 32 tokens. Quiet times and rounds alternate, so each ratio is of one run.

Run: `python -m benchmarks.users_while_training [--json] [--seed 0]`; about eight minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks import describe_machine, rl
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import NoGain
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from examples.quickstart.model import build_base
from protos.base import read_base_model
from protos.lora import LoraTensors

ROUNDS = 4
STEPS, PROMPTS = 12, 8
QUIET_S = 60.0
USERS_PER_S = 6.0
ANSWER_TOKENS = 32
BAR = 1.5


@dataclass
class Users:
    """Requests that arrive whatever happens to those before them."""

    http: httpx.AsyncClient
    random: random.Random
    total_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    async def come_until(self, over: asyncio.Event) -> None:
        asking = set()
        while not over.is_set():
            task = asyncio.create_task(self._ask())
            asking.add(task)
            task.add_done_callback(asking.discard)
            await asyncio.sleep(self.random.expovariate(USERS_PER_S))
        await asyncio.gather(*asking)

    async def _ask(self) -> None:
        body = {
            "messages": [
                {"role": "user", "content": f"ticket {self.random.randrange(10**4):04}: move"}
            ],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        began, first = time.monotonic(), None
        try:
            async with self.http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if first is None and line.startswith("data:"):
                        first = time.monotonic()
        except httpx.HTTPError as error:
            self.failed.append(repr(error))
            return
        self.total_s.append(time.monotonic() - began)
        self.first_token_s.append((first or time.monotonic()) - began)


async def run(folder: Path, cache: Path, seed: int, rounds: int) -> dict[str, Any]:
    path = await asyncio.to_thread(build_base, cache)
    base = read_base_model(path)
    settings = rl.settings_for(
        rl.WORLDS["E"], folder, path, seed, free_port(), steps=STEPS, prompts=PROMPTS
    )
    phases: dict[str, list[Users]] = {"quiet": [], "training": []}
    seconds: list[float] = []
    async with (
        rl.serving(settings, base) as control,
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{settings.serving.port}",
            timeout=120,
            limits=httpx.Limits(max_connections=None),
        ) as http,
    ):
        releases = rl.Releases(settings, base, control)
        await releases.add(LoraTensors())
        (folder / "settings.json").write_text(settings.model_dump_json())
        for number in range(rounds):
            plan = releases.plan(number + 1)
            for name in ("quiet", "training"):
                users = Users(http, random.Random(f"{seed}/{number}/{name}"))
                phases[name].append(users)
                over = asyncio.Event()
                coming = asyncio.create_task(users.come_until(over))
                began = time.monotonic()
                if name == "quiet":
                    await asyncio.sleep(QUIET_S)
                else:
                    await learn(folder, plan, releases.folder, number)
                    seconds.append(time.monotonic() - began)
                over.set()
                await coming
            print(f"pair {number + 1} of {rounds}: round {seconds[-1]:.0f} s", file=sys.stderr)
    return describe(phases, seconds)


async def learn(folder: Path, plan: RoundPlan, release: Path, number: int) -> None:
    """One round in a process of its own, as a node's learner is."""
    file, workspace = folder / f"plan-{number}.json", folder / f"round-{number}"
    file.write_bytes(plan.to_bytes())
    workspace.mkdir()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.users_while_training",
        "--learn", str(folder / "settings.json"), str(file), str(release), str(workspace),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if await child.wait():
        raise subprocess.CalledProcessError(child.returncode or 1, "the learner")


def learn_here(settings: Path, plan: Path, release: Path, workspace: Path) -> None:
    from edge_node.learning.exploration import train_on_verifiers
    from edge_node.learning.workplace import find_workplace

    round_plan = RoundPlan.from_bytes(plan.read_bytes())
    node = EdgeSettings.model_validate_json(settings.read_text())
    try:
        train_on_verifiers(round_plan, node, find_workplace(round_plan, node, release, workspace))
    except NoGain as error:  # the users' latency is what is measured
        print(error, file=sys.stderr)


def describe(phases: dict[str, list[Users]], seconds: list[float]) -> dict[str, Any]:
    """Percentiles of each phase, and the ratio of each pair."""
    figures = {
        name: [
            {
                f"{what}_p{percent}_ms": 1e3 * statistics.quantiles(taken, n=100)[percent - 1]
                for what, taken in (("total", one.total_s), ("first_token", one.first_token_s))
                for percent in (50, 99)
            }
            | {"answers": len(one.total_s)}
            for one in users
        ]
        for name, users in phases.items()
    }
    ratios = {
        key: [
            training[key] / quiet[key]
            for quiet, training in zip(figures["quiet"], figures["training"], strict=True)
        ]
        for key in figures["quiet"][0]
        if key != "answers"
    }
    failed = [text for users in phases.values() for one in users for text in one.failed]
    return {
        "figures": figures,
        "ratios": ratios,
        "round_s": seconds,
        "failed": len(failed),
        "first_failures": failed[:3],
        "bars": {
            f"users' p99 at most {BAR} times that without training": statistics.median(
                ratios["total_p99_ms"]
            )
            <= BAR,
            "no request failed": not failed,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.users_while_training",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    parser.add_argument("--learn", nargs=4, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.learn:
        learn_here(*options.learn)
        return 0
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        result = asyncio.run(run(Path(folder), options.cache, options.seed, options.rounds))
    for key in ("ratios", "round_s", "failed", "bars"):
        print(f"{key}: {result[key]}", file=sys.stderr)
    if options.json:
        print(json.dumps(result | {"seed": options.seed, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
