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
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import CHUNK_BYTES, Payload, ReleaseManifest, Start, UpdateManifest, sha256_hex, sign
from protos.operator.v1 import operator_pb2, operator_pb2_grpc
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

CLIENTS = 200
SIDE = 512
MODULES = 64
"""The base model: that many square modules. 1 MB is 16 of them at rank 16, 16 MB all 64 at rank 64."""
ROUNDS = 3
"""Phases of each kind; each sends one update a client, or two."""
PER_CLIENT = 2
PHASE_LIMIT_S = 100.0
"""A phase that takes longer ends the run with an error."""
MEMORY_RATIO = 1.1
"""Peak memory with 16 MB updates may be this many times that with 1 MB updates."""
SERVER_OPTIONS = (("grpc.so_reuseport", 0),)


@dataclass
class Client:
    """One enrolled node."""

    node_id: str
    key: ec.EllipticCurvePrivateKey
    key_pem: bytes
    certificate_pem: bytes
    genesis: ReleaseManifest


@dataclass(frozen=True)
class Phase:
    """What one phase took."""

    updates: int
    size_bytes: int
    wall_s: float
    latencies_s: list[float]

    @property
    def bytes_per_s(self) -> float:
        return self.updates * self.size_bytes / self.wall_s


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.intake", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bare", metavar="PKI,PORT", help=argparse.SUPPRESS)
    parser.add_argument("--clients", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        folder, port = arguments.bare.rsplit(",", 1)
        asyncio.run(serve_bare(Path(folder), int(port)))
        return 0
    if arguments.clients:
        asyncio.run(drive(Path(arguments.clients), arguments.seed))
        return 0
    with tempfile.TemporaryDirectory(prefix="lorikeet-intake-") as folder:
        figures = run(Path(folder), arguments.seed)
    for key, value in figures.items():
        print(f"{key:26s} {value}", file=sys.stderr)
    if arguments.json:
        print(json.dumps(figures))
    return 0 if all(figures["bars"].values()) else 1


def run(folder: Path, seed: int) -> dict[str, Any]:
    """All phases; the figures that are published."""
    make_base(folder / "base")
    phases: dict[str, list[Phase]] = {"bare": [], "intake": [], "large": []}
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "small"))
        bare_port = free_port()
        command = [sys.executable, "-m", "benchmarks.intake", "--bare", f"{folder / 'small' / 'pki'},{bare_port}"]
        stack.enter_context(child(command, {}))
        clients = stack.enter_context(Clients(folder, seed))
        clients.ask({"do": "enroll", "pki": str(folder / "small" / "pki"), "ports": ports})
        clients.ask({"do": "payload", "rank": 16, "modules": 16})
        # One phase that is not counted: connections, caches, imports.
        clients.ask({"do": "send", "port": bare_port, "each": 1, "label": "warm up"})
        clients.ask({"do": "send", "port": ports[0], "each": 1, "label": "warm up"})
        for number in range(ROUNDS):
            for kind, port in (("bare", bare_port), ("intake", ports[0])):
                label = f"{kind} {number + 1}/{ROUNDS}"
                answer = clients.ask({"do": "send", "port": port, "each": PER_CLIENT, "label": label})
                phases[kind].append(Phase(**answer))
        small_mb = peak_rss_mb(central.pid)
    admitted = count_admitted(folder / "small")
    with contextlib.ExitStack() as stack:
        central, ports = stack.enter_context(serving(folder, "large"))
        clients = stack.enter_context(Clients(folder, seed))
        clients.ask({"do": "enroll", "pki": str(folder / "large" / "pki"), "ports": ports})
        clients.ask({"do": "payload", "rank": 64, "modules": MODULES})
        phases["large"].append(Phase(**clients.ask({"do": "send", "port": ports[0], "each": 1, "label": "16 MB"})))
        large_mb = peak_rss_mb(central.pid)
    lost = CLIENTS * (1 + ROUNDS * PER_CLIENT) - admitted + CLIENTS - count_admitted(folder / "large")
    return figures(phases, small_mb, large_mb, lost, seed)


def figures(phases: dict[str, list[Phase]], small_mb: float, large_mb: float, lost: int, seed: int) -> dict[str, Any]:
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
        "peak_rss_mb": round(small_mb, 1),
        "large_update_bytes": large.size_bytes,
        "large_bytes_per_s": round(large.bytes_per_s),
        "large_peak_rss_mb": round(large_mb, 1),
        "updates_lost": lost,
        "phases_bytes_per_s": {
            kind: [round(phase.bytes_per_s) for phase in phases[kind]] for kind in ("bare", "intake")
        },
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "bars": {
            "at_least_half_of_the_bare_stream": rate >= 0.5 * bare_rate,
            "memory_does_not_grow_with_update_size": large_mb <= MEMORY_RATIO * small_mb,
            "nothing_lost": lost == 0,
        },
    }


# The servers.


def make_base(folder: Path) -> None:
    """A base model of zeros with `MODULES` linear modules; only its header and digest are used."""
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    weight = np.zeros((SIDE, SIDE), np.float16)
    save_file({f"{module_name(i)}.weight": weight for i in range(MODULES)}, folder / "model.safetensors")


def module_name(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj"


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


def peak_rss_mb(pid: int) -> float:
    """The largest resident set of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def count_admitted(data_dir: Path) -> int:
    """What the journal says after central was killed."""
    from central.journal import Journal

    journal = Journal(f"sqlite:///{data_dir / 'journal.db'}")
    with journal.read() as state:
        count = len(state.updates)
    journal.close()
    return count


# The clients: one process, told what to do line by line.


class Clients:
    """The process of the 200 clients, seen from the driver."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._command = [sys.executable, "-m", "benchmarks.intake", "--clients", str(folder), "--seed", str(seed)]

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


async def drive(folder: Path, seed: int) -> None:
    """Read requests from stdin, answer each with one line."""
    del folder
    fleet = Fleet(seed)
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        answer: Any = {}
        if request["do"] == "enroll":
            await fleet.enroll(Path(request["pki"]), request["ports"])
        elif request["do"] == "payload":
            fleet.payload = make_payload(request["rank"], request["modules"], seed)
        else:
            phase = await asyncio.wait_for(
                fleet.send(request["port"], request["each"], request["label"]), PHASE_LIMIT_S
            )
            answer = asdict(phase)
        print(json.dumps(answer), flush=True)


def make_payload(rank: int, modules: int, seed: int) -> bytes:
    """A valid update; its last four bytes are a value that each sent update changes."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: (random.standard_normal(shape) * 0.01).astype(np.float32)  # noqa: E731
    return encode(
        LoraTensors({module_name(i): LoraModule(draw(rank, SIDE), draw(SIDE, rank), 1.0) for i in range(modules)})
    )


class Fleet:
    """The 200 nodes."""

    def __init__(self, seed: int) -> None:
        self.payload = b""
        self._seed = seed
        self._ca = b""
        self._clients: list[Client] = []
        self._sequence = 0
        self._channels: dict[int, list[grpc.aio.Channel]] = {}

    async def enroll(self, pki: Path, ports: list[int]) -> None:
        """One token, 200 nodes."""
        self._ca = (pki / "ca.pem").read_bytes()
        key, certificate = (pki / "operator.key").read_bytes(), (pki / "operator.pem").read_bytes()
        credentials = grpc.ssl_channel_credentials(self._ca, key, certificate)
        async with grpc.aio.secure_channel(f"localhost:{ports[0]}", credentials) as channel:
            request = operator_pb2.CreateTokenRequest(cohort="shared", uses=CLIENTS, valid_s=3600)
            token = (await operator_pb2_grpc.OperatorServiceStub(channel).CreateToken(request, timeout=30)).token
        from edge_node.identity import JoinToken

        parsed = JoinToken.parse(token)
        address = f"localhost:{ports[1]}"
        base = await asyncio.to_thread(read_base_digest, pki.parent.parent / "base")
        async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self._ca)) as channel:
            stub = fleet_pb2_grpc.EnrollmentServiceStub(channel)
            for number in range(CLIENTS):
                self._clients.append(await enroll(stub, parsed.token_id, parsed.secret, base, f"n{number}"))
                show("enrolling", number + 1, CLIENTS)

    async def send(self, port: int, each: int, label: str) -> Phase:
        """Every client sends `each` updates, one after the other, all clients at once."""
        channels = await self._connect(port)
        # Signing is the node's own work: done before the clock runs.
        work = [[self._prepare(client) for _ in range(each)] for client in self._clients]
        latencies: list[float] = []
        started = time.perf_counter()

        async def client(channel: grpc.aio.Channel, updates: list[tuple[bytes, bytes, bytes]]) -> None:
            upload = updates_pb2_grpc.UpdateServiceStub(channel).Upload
            for manifest, signature, tail in updates:
                began = time.perf_counter()
                answer = await upload(self._parts(manifest, signature, tail), timeout=PHASE_LIMIT_S)
                if not answer.receipt.body:
                    raise SystemExit("central answered without a receipt")
                latencies.append(time.perf_counter() - began)
                show(label, len(latencies), CLIENTS * each)

        async with asyncio.TaskGroup() as tasks:
            for channel, updates in zip(channels, work, strict=True):
                tasks.create_task(client(channel, updates))
        return Phase(len(latencies), len(self.payload), time.perf_counter() - started, latencies)

    async def _connect(self, port: int) -> list[grpc.aio.Channel]:
        if port not in self._channels:
            self._channels[port] = [
                grpc.aio.secure_channel(
                    f"localhost:{port}",
                    grpc.ssl_channel_credentials(self._ca, client.key_pem, client.certificate_pem),
                    options=(("grpc.use_local_subchannel_pool", 1),),
                )
                for client in self._clients
            ]
            for number, channel in enumerate(self._channels[port]):
                await asyncio.wait_for(channel.channel_ready(), 60)
                show("connecting", number + 1, CLIENTS)
        return self._channels[port]

    def _prepare(self, client: Client) -> tuple[bytes, bytes, bytes]:
        """Manifest, signature, and the last four bytes that make this payload unlike every other."""
        self._sequence += 1
        tail = np.float32(self._sequence * 1e-6).tobytes()
        payload = self.payload[:-4] + tail
        genesis = client.genesis
        manifest = UpdateManifest(
            node_id=client.node_id,
            sequence=self._sequence,
            base=genesis.base,
            start=Start(release=genesis.digest, payload=genesis.payload.digest_sha256, prefix_rank=0, dtype="float32"),
            rank=64 if len(payload) > 4 * CHUNK_BYTES else 16,
            payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            round_id=f"round-{self._sequence}",
            experiences=1,
            created_at="2026-11-22T12:00:00Z",
            software="benchmarks.intake",
        ).to_bytes()
        return manifest, sign(client.key, manifest), tail

    async def _parts(self, manifest: bytes, signature: bytes, tail: bytes) -> AsyncIterator[updates_pb2.UploadRequest]:
        yield updates_pb2.UploadRequest(header=updates_pb2.UploadHeader(manifest=manifest, signature=signature))
        for begin in range(0, len(self.payload), CHUNK_BYTES):
            chunk = self.payload[begin : begin + CHUNK_BYTES]
            if begin + CHUNK_BYTES >= len(self.payload):
                chunk = chunk[:-4] + tail
            yield updates_pb2.UploadRequest(chunk=chunk)


async def enroll(
    stub: fleet_pb2_grpc.EnrollmentServiceStub, token_id: str, secret: str, base: str, name: str
) -> Client:
    """One node as central enrols it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
    answer = await stub.Enroll(
        fleet_pb2.EnrollRequest(
            token_id=token_id,
            token_secret=secret,
            csr_pem=request.public_bytes(Encoding.PEM),
            base_digest=base,
            node_name=name,
        ),
        timeout=30,
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    genesis = ReleaseManifest.from_bytes(answer.genesis.manifest)
    return Client(answer.node_id, key, pem, answer.certificate_pem, genesis)


def read_base_digest(folder: Path) -> str:
    from protos.base import read_base_model

    return read_base_model(folder).digest


def show(label: str, done: int, total: int) -> None:
    """A progress bar on stderr."""
    if done == total or done % 20 == 0:
        filled = 30 * done // total
        end = "\n" if done == total else ""
        print(
            f"\r{label:12s} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True
        )


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return "unknown"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
