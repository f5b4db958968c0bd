"""Switches under load: every answer is compared with the exact text of the version that it names.

In: nothing but a temporary directory; the quickstart's base model is trained at the first run. Out:
figures; with `--json` one object as the last line. Eight adapters of different answers take turns:
each switch loads one under a new version name, points the alias at it, and unloads the version
before the last one. Clients ask all the time. Quiet times and times of switches alternate, so the
ratio of their 99th percentiles is of one run.

Run: `python -m benchmarks.switching [--json] [--seed 0]`; about four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import describe_machine
from benchmarks.load.servers import memory_mb, node_server
from benchmarks.serving import random_adapter, settings_for, write_adapter
from edge_node.access import Scope, create_key, keys_file
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from examples.quickstart.model import build_base
from protos.base import BaseModelInfo, read_base_model

ADAPTERS = 8
SWITCHES, PER_WINDOW = 200, 20
CLIENTS = 8
ANSWER_TOKENS = 12
PROMPTS = [f"ticket {number}: move in lyon" for number in (1203, 4711, 8080, 9999)]
ALIAS = "lorikeet"
STRENGTH = 0.5
"""Of the adapters' factors: strong enough that no two give one prompt the same answer."""
P99_BAR = 1.2
SLOPE_BAR_MB = 5.0
"""Per 100 switches."""


@dataclass
class Seen:
    """What clients met: counts, and seconds of the answers in quiet and in switching times."""

    failed: list[str] = field(default_factory=list)
    mixed: int = 0
    misattributed: int = 0
    quiet_s: list[float] = field(default_factory=list)
    switching_s: list[float] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)


class Load:
    """Clients that ask without a pause, and compare."""

    def __init__(self, http: httpx.AsyncClient, texts: dict[tuple[int, str], str]) -> None:
        self._http, self._texts = http, texts
        self._stopped = False
        self.is_switching = False
        self.seen = Seen()

    async def client(self, number: int) -> None:
        turn = number
        while not self._stopped:
            await self._ask(PROMPTS[turn % len(PROMPTS)])
            turn += 1

    def stop(self) -> None:
        self._stopped = True

    async def _ask(self, prompt: str) -> None:
        was_switching, began = self.is_switching, time.monotonic()
        try:
            answer = await self._http.post("/v1/chat/completions", json=body_of(ALIAS, prompt))
        except httpx.HTTPError as error:
            self.seen.failed.append(repr(error))
            return
        if answer.status_code != 200:
            self.seen.failed.append(f"{answer.status_code}: {answer.text[:200]}")
            return
        if was_switching == self.is_switching:
            taken = self.seen.switching_s if was_switching else self.seen.quiet_s
            taken.append(time.monotonic() - began)
        document = answer.json()
        version, text = document["model"], document["choices"][0]["message"]["content"]
        self.seen.versions.add(version)
        if answer.headers["x-lorikeet-model"] != version:
            self.seen.misattributed += 1
        elif text != self._texts[adapter_of(version), prompt]:
            if text in {self._texts[adapter, prompt] for adapter in range(ADAPTERS)}:
                self.seen.misattributed += 1
            else:
                self.seen.mixed += 1


def body_of(model: str, prompt: str) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


def name_of(switch: int) -> str:
    return f"{ALIAS}@v{switch}-{switch:08x}"


def adapter_of(version: str) -> int:
    """Which of the adapters a version holds."""
    return int(version.rpartition("-")[2], 16) % ADAPTERS


class Switcher:
    """Loads, points and unloads; `switch_ms` is how long the first two took."""

    def __init__(
        self, settings: EdgeSettings, base: BaseModelInfo, control: ControlClient, seed: int
    ) -> None:
        self._versions = settings.data_dir / "releases" / "versions"
        self._base, self._control = base, control
        self._adapters = [
            random_adapter(base, seed * ADAPTERS + number, STRENGTH) for number in range(ADAPTERS)
        ]
        self._loaded: list[str] = []
        self._switch = -1
        self.switch_ms: list[float] = []

    async def load_next(self) -> str:
        self._switch += 1
        version = name_of(self._switch)
        folder = write_adapter(
            self._base, self._adapters[self._switch % ADAPTERS], self._versions / version
        )
        await self._control.load(version, folder)
        self._loaded.append(version)
        return version

    async def switch(self) -> None:
        began = time.monotonic()
        await self._control.point(await self.load_next())
        self.switch_ms.append((time.monotonic() - began) * 1e3)
        await self.unload_old()

    async def unload_old(self) -> None:
        while len(self._loaded) > 2:
            await self._control.unload(self._loaded.pop(0))


async def expected_texts(switcher: Switcher, http: httpx.AsyncClient) -> dict[tuple[int, str], str]:
    """What each adapter answers when nothing else happens."""
    texts: dict[tuple[int, str], str] = {}
    for adapter in range(ADAPTERS):
        version = await switcher.load_next()
        for prompt in PROMPTS:
            answer = await http.post("/v1/chat/completions", json=body_of(version, prompt))
            answer.raise_for_status()
            texts[adapter, prompt] = answer.json()["choices"][0]["message"]["content"]
        await switcher.unload_old()
    for prompt in PROMPTS:
        if len({texts[adapter, prompt] for adapter in range(ADAPTERS)}) < ADAPTERS:
            raise SystemExit("Two adapters give one prompt the same answer; take another --seed.")
    return texts


async def run(folder: Path, cache: Path, seed: int, switches: int) -> dict[str, Any]:
    base = read_base_model(await asyncio.to_thread(build_base, cache))
    settings = settings_for(folder, base.path)
    # What shares a batch changes bfloat16's rounding, and a text would be no proof of its version.
    settings = settings.model_copy(
        update={"serving": settings.serving.model_copy(update={"dtype": "float32"})}
    )
    key = create_key(keys_file(settings), "benchmark", [Scope.INFER], None)
    rss: list[tuple[int, float]] = []
    async with (
        node_server(settings, base) as (control, pid),
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{settings.serving.port}",
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
            limits=httpx.Limits(max_connections=CLIENTS),
        ) as http,
    ):
        switcher = Switcher(settings, base, control, seed)
        load = Load(http, await expected_texts(switcher, http))
        await switcher.switch()
        clients = [asyncio.create_task(load.client(number)) for number in range(CLIENTS)]
        done = 0
        while done < switches:
            began = time.monotonic()
            load.is_switching = True
            for _ in range(min(PER_WINDOW, switches - done)):
                await switcher.switch()
                done += 1
                await asyncio.sleep(0.1)
            load.is_switching = False
            rss.append((done, memory_mb(pid)))
            print(f"{done} of {switches} switches, {rss[-1][1]:.0f} MB", file=sys.stderr)
            await asyncio.sleep(time.monotonic() - began)  # as long in quiet
        load.stop()
        await asyncio.gather(*clients)
    return describe(load.seen, switcher.switch_ms[1:], rss)


def describe(seen: Seen, switch_ms: list[float], rss: list[tuple[int, float]]) -> dict[str, Any]:
    """The published keys; memory's slope is of the second half, when caches are full."""
    late = rss[len(rss) // 2 :]
    slope = float(np.polyfit([at for at, _ in late], [mb for _, mb in late], 1)[0]) * 100
    p99 = {
        name: 1e3 * statistics.quantiles(taken, n=100)[98]
        for name, taken in (("quiet", seen.quiet_s), ("switching", seen.switching_s))
    }
    return {
        "switches": len(switch_ms),
        "answers": {"quiet": len(seen.quiet_s), "switching": len(seen.switching_s)},
        "versions_that_answered": len(seen.versions),
        "failed": len(seen.failed),
        "first_failures": seen.failed[:3],
        "mixed": seen.mixed,
        "misattributed": seen.misattributed,
        "p99_ms": p99,
        "p99_ratio": p99["switching"] / p99["quiet"],
        "switch_ms": {
            "median": statistics.median(switch_ms),
            "p99": statistics.quantiles(switch_ms, n=100)[98],
            "most": max(switch_ms),
        },
        "rss_mb": rss,
        "rss_mb_per_100_switches": slope,
        "bars": {
            "no answer failed": not seen.failed,
            "none was mixed": seen.mixed == 0,
            "none named another version": seen.misattributed == 0,
            f"p99 at most {P99_BAR} of quiet": p99["switching"] <= P99_BAR * p99["quiet"],
            f"under {SLOPE_BAR_MB:g} MB per 100 switches": slope < SLOPE_BAR_MB,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.switching", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--switches", type=int, default=SWITCHES)
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        result = asyncio.run(run(Path(folder), options.cache, options.seed, options.switches))
    for key, value in result.items():
        print(f"{key:26s} {value}", file=sys.stderr)
    if options.json:
        print(json.dumps(result | {"seed": options.seed, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
