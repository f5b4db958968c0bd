"""How fast central takes updates in: 200 nodes at once over mutual TLS, 1 MB updates, every byte on disk before the receipt.

In: nothing but a temporary directory (`TMPDIR`). Out: figures; with `--json` one object as the last line. Central is the
real `central serve` in a process of its own, the 200 clients run in another, and a third serves the same gRPC stream
over the same TLS without storing anything: what intake is compared with. Bare and real phases take turns, because the
machine's speed wanders; a figure is the median of its phases. Every receipt is counted against the journal.

Run: `python -m benchmarks.intake [--json] [--seed 0]`; about two minutes and 5 GB of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from safetensors.numpy import save_file

from benchmarks import describe_machine, peak_rss_mb
from benchmarks.load.nodes import CLIENTS, SIDE, Phase, module_name
from central.journal import Journal
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

MODULES = 64
"""Of the base model."""
ROUNDS = 3
"""Phases of each kind; each sends one update a client, or two."""
PER_CLIENT = 2
MEMORY_RATIO = 1.1
"""Peak memory with 16 MB updates may be this many times that with 1 MB updates."""
SERVER_OPTIONS = (("grpc.so_reuseport", 0),)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.intake", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", metavar="PKI,PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        folder, port = arguments.bare.rsplit(",", 1)
        asyncio.run(serve_bare(Path(folder), int(port)))
        return 0
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
    phases: dict[str, list[Phase]] = {"bare": [], "intake": [], "large": []}
    used_s: dict[str, list[float]] = {"bare": [], "intake": []}
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "small"))
        bare_port = free_port()
        command = [sys.executable, "-m", "benchmarks.intake", "--bare", f"{folder / 'small' / 'pki'},{bare_port}"]
        bare = stack.enter_context(child(command, {}))
        clients = stack.enter_context(Clients(seed))
        clients.ask({"do": "enroll", "pki": str(folder / "small" / "pki"), "ports": ports})
        clients.ask({"do": "payload", "rank": 16, "modules": 16})
        # One phase that is not counted: connections, caches, imports.
        clients.ask({"do": "send", "port": bare_port, "each": 1, "label": "warm up"})
        clients.ask({"do": "send", "port": ports[0], "each": 1, "label": "warm up"})
        for number in range(ROUNDS):
            for kind, port, server in (("bare", bare_port, bare), ("intake", ports[0], central)):
                label = f"{kind} {number + 1}/{ROUNDS}"
                before = cpu_s(server.pid)
                answer = clients.ask({"do": "send", "port": port, "each": PER_CLIENT, "label": label})
                phases[kind].append(Phase(**answer))
                used_s[kind].append((cpu_s(server.pid) - before) / phases[kind][-1].updates)
        small_mb = peak_rss_mb(central.pid)
    admitted = count_admitted(folder / "small")
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "large"))
        clients = stack.enter_context(Clients(seed))
        clients.ask({"do": "enroll", "pki": str(folder / "large" / "pki"), "ports": ports})
        clients.ask({"do": "payload", "rank": 64, "modules": MODULES})
        phases["large"].append(Phase(**clients.ask({"do": "send", "port": ports[0], "each": 1, "label": "16 MB"})))
        large_mb = peak_rss_mb(central.pid)
    lost = CLIENTS * (1 + ROUNDS * PER_CLIENT) - admitted + CLIENTS - count_admitted(folder / "large")
    return figures(phases, used_s, small_mb, large_mb, lost, seed)


def figures(
    phases: dict[str, list[Phase]],
    used_s: dict[str, list[float]],
    small_mb: float,
    large_mb: float,
    lost: int,
    seed: int,
) -> dict[str, Any]:
    """The published keys."""
    intake, bare, large = phases["intake"], phases["bare"], phases["large"][0]
    rate = statistics.median(phase.bytes_per_s for phase in intake)
    bare_rate = statistics.median(phase.bytes_per_s for phase in bare)
    latencies = [latency for phase in intake for latency in phase.latencies_s]
    return {
        "clients": CLIENTS,
        "update_bytes": intake[0].size_bytes,
        "updates_per_s": round(statistics.median(phase.updates / phase.wall_s for phase in intake), 1),
        "bytes_per_s": round(rate),
        "p99_ms": round(float(np.percentile(latencies, 99)) * 1e3),
        "p50_ms": round(float(np.percentile(latencies, 50)) * 1e3),
        "bare_stream_bytes_per_s": round(bare_rate),
        "share_of_bare_stream": round(rate / bare_rate, 3),
        # Of the server's process per update, median: other load on the machine changes it less than the rates.
        "cpu_ms": round(statistics.median(used_s["intake"]) * 1e3, 2),
        "bare_stream_cpu_ms": round(statistics.median(used_s["bare"]) * 1e3, 2),
        "peak_rss_mb": round(small_mb, 1),
        "large_update_bytes": large.size_bytes,
        "large_bytes_per_s": round(large.bytes_per_s),
        "large_peak_rss_mb": round(large_mb, 1),
        "retries": sum(phase.retries for kind in phases.values() for phase in kind),
        "updates_lost": lost,
        "phases_bytes_per_s": {
            kind: [round(phase.bytes_per_s) for phase in phases[kind]] for kind in ("bare", "intake")
        },
        "seed": seed,
        "machine": describe_machine(),
        "bars": {
            "at_least_half_of_the_bare_stream": rate >= 0.5 * bare_rate,
            "memory_does_not_grow_with_update_size": large_mb <= MEMORY_RATIO * small_mb,
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
    save_file({f"{module_name(i)}.weight": weight for i in range(MODULES)}, folder / "model.safetensors")


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
def child(command: list[str], settings: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A server process that has printed its first line; killed at the end."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")} | settings
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise SystemExit(f"{' '.join(command)} did not start: exit code {process.wait()}.")
        yield process
    finally:
        process.kill()
        process.communicate()


class Bare(updates_pb2_grpc.UpdateServiceServicer):
    """The same stream, counted and forgotten."""

    async def Upload(self, request_iterator: AsyncIterator[updates_pb2.UploadRequest], context: Any) -> Any:
        size = 0
        async for request in request_iterator:
            size += len(request.chunk)
        return updates_pb2.UploadResponse(receipt=updates_pb2.Receipt(body=str(size).encode()))


async def serve_bare(pki: Path, port: int) -> None:
    """The gRPC stream without storage, with central's own certificates."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    updates_pb2_grpc.add_UpdateServiceServicer_to_server(Bare(), server)
    pair = ((pki / "server.key").read_bytes(), (pki / "server.pem").read_bytes())
    ca = (pki / "ca.pem").read_bytes()
    server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair], ca, require_client_auth=True))
    await server.start()
    print("bare", flush=True)
    await server.wait_for_termination()


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
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
