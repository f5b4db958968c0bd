"""How fast central takes updates in, and with how much memory: 200 nodes at once, mutual TLS.

In: nothing but a temporary directory (`TMPDIR`). Out: figures; with `--json` one object as the last
line. Central is the real `central serve` in a process of its own, and every byte is on disk before
the receipt. The 200 clients run in one more process, on the same cores. A second server takes the
same gRPC stream over the same TLS and forgets it: the bare stream. The phases of both take turns,
because the machine's speed wanders; a figure is the median of its phases. One phase sends over
links of 0.3 MB/s each, and the last one sends 16 MB updates to a fresh central. Every receipt is
counted against the journal.

Run: `python -m benchmarks.intake [--json] [--seed 0]`; about two minutes and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benchmarks import describe_machine, peak_rss_mb
from benchmarks.load.nodes import CLIENTS, SIDE, Phase, module_name
from central.journal import Journal
from examples.ports import free_port

MODULES = 64
"""Of the base model."""
ROUNDS = 3
"""Phases of each kind; each sends one update a client, or two."""
PER_CLIENT = 2
LEAST_UPDATES_PER_S = 90
"""Of 1 MB, on two cores that central shares with the clients."""
MOST_MEMORY_MB = 0.35e9 / 2**20
"""Of central, whatever comes: 0.35 GB. Figures in MB count 2**20 bytes, as the kernel does."""
LINK_BYTES_PER_S = 300_000
"""Of each client whose link is slow."""
LINK_SHARE = 0.75
"""Of what all links give together; so many clients in one process cost a little."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.intake", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--json", action="store_true", help="print the figures as one JSON object, the last line"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorikeet-intake-") as folder:
        figures = run(Path(folder), arguments.seed)
    for key, value in figures.items():
        print(f"{key:26s} {value}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures))
    return 0


def run(folder: Path, seed: int) -> dict[str, Any]:
    """All phases; the figures that are published."""
    make_base(folder / "base")
    phases: dict[str, list[Phase]] = {
        "bare": [],
        "intake": [],
        "slow": [],
        "large": [],
    }
    used_s: dict[str, list[float]] = {"bare": [], "intake": []}
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "small"))
        pki = folder / "small" / "pki"
        bare = stack.enter_context(serving_stream(pki))
        servers = {"bare": bare, "intake": (central, ports[0])}
        clients = stack.enter_context(Clients(seed))
        clients.ask({"do": "enroll", "pki": str(pki), "ports": ports})
        clients.ask({"do": "payload", "rank": 16, "modules": 16})
        # One phase that is not counted: connections, caches, imports.
        for _, port in servers.values():
            clients.ask({"do": "send", "port": port, "each": 1, "label": "warm up"})
        for number in range(ROUNDS):
            for kind, (server, port) in servers.items():
                label = f"{kind} {number + 1}/{ROUNDS}"
                before = cpu_s(server.pid)
                answer = clients.ask(
                    {"do": "send", "port": port, "each": PER_CLIENT, "label": label}
                )
                phases[kind].append(Phase(**answer))
                used_s[kind].append((cpu_s(server.pid) - before) / phases[kind][-1].updates)
        small_mb = peak_rss_mb(central.pid)
        request = {
            "do": "send",
            "port": ports[0],
            "each": 1,
            "label": "slow links",
            "link": LINK_BYTES_PER_S,
        }
        phases["slow"].append(Phase(**clients.ask(request)))
        slow_mb = peak_rss_mb(central.pid)
    admitted = count_admitted(folder / "small")
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "large"))
        clients = stack.enter_context(Clients(seed))
        clients.ask({"do": "enroll", "pki": str(folder / "large" / "pki"), "ports": ports})
        clients.ask({"do": "payload", "rank": 64, "modules": MODULES})
        phases["large"].append(
            Phase(**clients.ask({"do": "send", "port": ports[0], "each": 1, "label": "16 MB"}))
        )
        large_mb = peak_rss_mb(central.pid)
    lost = (
        CLIENTS * (2 + ROUNDS * PER_CLIENT) - admitted + CLIENTS - count_admitted(folder / "large")
    )
    return figures(phases, used_s, (small_mb, slow_mb, large_mb), lost, seed)


def figures(
    phases: dict[str, list[Phase]],
    used_s: dict[str, list[float]],
    peaks_mb: tuple[float, float, float],
    lost: int,
    seed: int,
) -> dict[str, Any]:
    """The published keys."""
    intake, slow, large = phases["intake"], phases["slow"][0], phases["large"][0]
    small_mb, slow_mb, large_mb = peaks_mb
    rate, bare_rate = (
        statistics.median(phase.bytes_per_s for phase in phases[kind])
        for kind in ("intake", "bare")
    )
    updates_per_s = statistics.median(phase.updates / phase.wall_s for phase in intake)
    latencies = [latency for phase in intake for latency in phase.latencies_s]
    return {
        "clients": CLIENTS,
        "update_bytes": intake[0].size_bytes,
        "updates_per_s": round(updates_per_s, 1),
        "bytes_per_s": round(rate),
        "p99_ms": round(float(np.percentile(latencies, 99)) * 1e3),
        "p50_ms": round(float(np.percentile(latencies, 50)) * 1e3),
        "bare_stream_bytes_per_s": round(bare_rate),
        "share_of_bare_stream": round(rate / bare_rate, 3),
        # Of the server's process per update, median. Other load changes it less than the rates.
        "cpu_ms": round(statistics.median(used_s["intake"]) * 1e3, 2),
        "bare_stream_cpu_ms": round(statistics.median(used_s["bare"]) * 1e3, 2),
        "peak_rss_mb": round(small_mb, 1),
        "slow_links_bytes_per_s": round(slow.bytes_per_s),
        "slow_links_share": round(slow.bytes_per_s / (CLIENTS * LINK_BYTES_PER_S), 3),
        "slow_links_peak_rss_mb": round(slow_mb, 1),
        "large_update_bytes": large.size_bytes,
        "large_bytes_per_s": round(large.bytes_per_s),
        "large_peak_rss_mb": round(large_mb, 1),
        "retries": sum(phase.retries for kind in phases.values() for phase in kind),
        "updates_lost": lost,
        "phases_bytes_per_s": {
            kind: [round(phase.bytes_per_s) for phase in phases[kind]]
            for kind in ("bare", "intake")
        },
        "seed": seed,
        "machine": describe_machine(),
        "bars": {
            "at_least_90_updates_per_s": updates_per_s >= LEAST_UPDATES_PER_S,
            "slow_links_are_not_throttled": slow.bytes_per_s
            >= LINK_SHARE * CLIENTS * LINK_BYTES_PER_S,
            "at_most_0.35_gb": max(peaks_mb) <= MOST_MEMORY_MB,
            "nothing_lost": lost == 0,
        },
    }


# The servers.


def make_base(folder: Path) -> None:
    """A base model of zeros with `MODULES` linear modules; only its header and digest are used."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    weight = np.zeros((SIDE, SIDE), np.float16)
    save_file(
        {f"{module_name(i)}.weight": weight for i in range(MODULES)}, folder / "model.safetensors"
    )


@contextlib.contextmanager
def serving(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """`central serve` on free ports with a data directory of its own; it merges nothing."""
    ports = [free_port(), free_port()]
    settings = {
        "CENTRAL_DATA_DIR": str(folder / name),
        "CENTRAL_BASE__PATH": str(folder / "base"),
        "CENTRAL_LISTEN__PORT": str(ports[0]),
        "CENTRAL_LISTEN__ENROLLMENT_PORT": str(ports[1]),
        "CENTRAL_MERGE__MIN_UPDATES": "1000000",
        "CENTRAL_MERGE__MAX_AGE_S": "1000000",
    }
    with child([sys.executable, "-m", "central.cli", "serve"], settings) as process:
        yield process, ports


@contextlib.contextmanager
def serving_stream(pki: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The bare stream on a free port, with central's certificates."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.load.streams", str(pki), str(port)]
    with child(command, {}) as process:
        yield process, port


HEAPS = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""As in central's image: threads share heaps, and large pieces go back to the system."""


@contextlib.contextmanager
def child(command: list[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A server process that has printed its first line; killed at the end."""
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")
    }
    environment |= HEAPS | settings
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{' '.join(command)} did not start: exit code {process.wait()}.")
        yield process
    finally:
        process.kill()
        process.communicate()


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count_admitted(data_dir: Path) -> int:
    """What the journal says after central was killed."""
    journal = Journal(f"sqlite:///{data_dir / 'journal.db'}")
    with journal.read() as state:
        count = len(state.updates)
    journal.close()
    return count


class Clients:
    """The process of the 200 clients, seen from the driver."""

    def __init__(self, seed: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.load.nodes", "--seed", str(seed)]

    def __enter__(self) -> Clients:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"The clients failed at {request}; their error is above.")
        return json.loads(line)


if __name__ == "__main__":
    sys.exit(main())
