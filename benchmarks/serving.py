"""What the gateway costs: a node's vLLM beside a bare vLLM, in interleaved pairs of one run.

In: nothing but a temporary directory; the quickstart's base model is trained at the first run. Out:
figures; with `--json` one object as the last line. Both servers have the same model, adapter and
arithmetic. The node has access keys, limits, capture and its metrics on, and each answer is on disk
before its last byte leaves. In each round both get the same requests, 32 at a time, in turns.

Run: `python -m benchmarks.serving [--json] [--seed 0]`; about six minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import describe_machine
from benchmarks.load.servers import bare_server, cpu_s, node_server
from edge_node.access import Scope, create_key, keys_file
from edge_node.experience import ExperienceStore
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import EdgeSettings
from examples.ports import free_port
from examples.quickstart.model import build_base
from protos.base import BaseModelInfo, read_base_model
from protos.lora import LoraModule, LoraTensors

CONCURRENCY = 32
ROUNDS = 9
ALIAS, VERSION = "lorikeet", "lorikeet@v1-00000001"
RANK = 8
CPU_BAR = 1.15


@dataclass(frozen=True)
class Workload:
    """`bar`: the least throughput beside a bare vLLM's."""

    requests: int
    answer_tokens: int
    stream: bool
    bar: float


WORKLOADS = {
    "streams of 32 tokens": Workload(512, 32, True, 0.95),
    "one token, the worst case": Workload(1536, 1, False, 0.90),
}


def settings_for(data_dir: Path, base: Path) -> EdgeSettings:
    """A node that does all that a node does to a request."""
    return EdgeSettings.model_validate(
        {
            "data_dir": data_dir,
            "base": {"path": base},
            "serving": {
                "port": free_port(),
                "max_model_len": 256,
                "access": "required",
                "limits": {"requests_per_minute": 10**7, "concurrent_requests": 10**4},
            },
            "capture": {"enabled": True},
        }
    )


def random_adapter(base: BaseModelInfo, seed: int, strength: float = 0.05) -> LoraTensors:
    """Random factors for every module of the base."""
    random = np.random.default_rng(seed)
    return LoraTensors(
        {
            name: LoraModule(
                A=random.normal(0, columns**-0.5, (RANK, columns)).astype(np.float32),
                B=random.normal(0, strength, (rows, RANK)).astype(np.float32),
            )
            for name, (rows, columns) in base.module_shapes.items()
        }
    )


def write_adapter(base: BaseModelInfo, adapter: LoraTensors, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in peft_files(adapter, base.module_shapes).items():
        (folder / name).write_bytes(data)
    return folder


async def send(server: dict[str, Any], workload: Workload, seed: int) -> dict[str, Any]:
    """One phase: what the requests took, and the server's processor time for them."""
    asked = {
        **{key: server[key] for key in ("url", "key", "model")},
        "requests": workload.requests,
        "answer_tokens": workload.answer_tokens,
        "stream": workload.stream,
        "concurrency": CONCURRENCY,
        "seed": seed,
    }
    before = cpu_s(server["pid"])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.load.requests",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate(json.dumps(asked).encode())
    if process.returncode != 0:
        raise SystemExit("The clients failed; their error is above.")
    result: dict[str, Any] = json.loads(output)
    if result["failed"]:
        raise SystemExit(f"Requests to {server['url']} failed: {result['failed']}.")
    return {
        "cpu_ms_per_request": (cpu_s(server["pid"]) - before) / workload.requests * 1e3,
        "requests_per_s": workload.requests / result["seconds"],
        "p50_ms": statistics.median(result["latencies_ms"]),
        "p99_ms": statistics.quantiles(result["latencies_ms"], n=100)[98],
    }


async def run(folder: Path, cache: Path, seed: int, rounds: int) -> dict[str, Any]:
    base = read_base_model(await asyncio.to_thread(build_base, cache))
    settings = settings_for(folder / "node", base.path)
    adapter = random_adapter(base, seed)
    key = create_key(keys_file(settings), "benchmark", [Scope.INFER], None)
    versions = settings.data_dir / "releases" / "versions"
    bare_folder = write_adapter(base, adapter, folder / "bare")
    log = folder / "bare.log"
    async with (
        node_server(settings, base) as (control, node_pid),
        bare_server(settings, base, ALIAS, bare_folder, log) as (bare_url, bare_pid),
    ):
        await control.load(VERSION, write_adapter(base, adapter, versions / VERSION))
        await control.point(VERSION)
        node_url = f"http://127.0.0.1:{settings.serving.port}"
        servers: dict[str, dict[str, Any]] = {
            "bare": {"url": bare_url, "key": None, "model": ALIAS, "pid": bare_pid},
            "node": {"url": node_url, "key": key, "model": ALIAS, "pid": node_pid},
        }
        figures: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for name, workload in WORKLOADS.items():
            taken: dict[str, list[dict[str, Any]]] = {"bare": [], "node": []}
            for number in range(-1, rounds):  # the first one warms both up
                order = ("bare", "node") if number % 2 else ("node", "bare")
                for which in order:
                    result = await send(servers[which], workload, seed + number)
                    if number >= 0:
                        taken[which].append(result)
                print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr)
            figures[name] = taken
    kept = ExperienceStore(settings.data_dir / "experience.db").counts().interactions
    return describe(figures, kept, sum(each.requests for each in WORKLOADS.values()) * (rounds + 1))


def describe(
    figures: dict[str, dict[str, list[dict[str, Any]]]], kept: int, asked: int
) -> dict[str, Any]:
    """Ratios of each pair, and the bars on their medians."""
    ratios = {
        name: {
            key: [node[key] / bare[key] for node, bare in zip(*_pair(taken), strict=True)]
            for key in ("cpu_ms_per_request", "requests_per_s", "p50_ms", "p99_ms")
        }
        for name, taken in figures.items()
    }
    bars = {"every answer is kept": kept == asked}
    for name, workload in WORKLOADS.items():
        cpu, throughput = (
            statistics.median(ratios[name][key]) for key in ("cpu_ms_per_request", "requests_per_s")
        )
        bars[f"{name}: processor time <= {CPU_BAR}"] = cpu <= CPU_BAR
        bars[f"{name}: throughput >= {workload.bar}"] = throughput >= workload.bar
    return {"figures": figures, "ratios": ratios, "kept": [kept, asked], "bars": bars}


def _pair(taken: dict[str, list[dict[str, Any]]]) -> tuple[list[dict[str, Any]], ...]:
    return taken["node"], taken["bare"]


def show(result: dict[str, Any]) -> None:
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 110)
    for name, taken in result["figures"].items():
        table = Table("figure", "bare vLLM", "node", "ratio of each pair: least, median, most")
        table.title = name
        for key, ratios in result["ratios"][name].items():
            table.add_row(
                key,
                *(
                    f"{statistics.median(each[key] for each in taken[which]):.2f}"
                    for which in ("bare", "node")
                ),
                f"{min(ratios):.2f}, {statistics.median(ratios):.2f}, {max(ratios):.2f}",
            )
        console.print(table)
    for name, held in result["bars"].items():
        console.print(f"{name}: {'holds' if held else 'FAILS'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"))
    options = parser.parse_args()
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:
        result = asyncio.run(run(Path(folder), options.cache, options.seed, options.rounds))
    show(result)
    if options.json:
        print(json.dumps(result | {"seed": options.seed, "machine": machine}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
