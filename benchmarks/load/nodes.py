"""The clients of the intake benchmark: 200 enrolled nodes in one process, commanded line by line.

In: JSON requests on stdin. Out: one JSON line each on stdout, a progress bar on stderr. A call that
fails is repeated, as a node repeats it, from the byte that central names; it counts as one update
and as a retry.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator
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

from edge_node.identity import JoinToken
from protos.base import read_base_model
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import (
    CHUNK_BYTES,
    Payload,
    ReleaseManifest,
    Start,
    UpdateManifest,
    sha256_hex,
    sign,
)
from protos.operators.v1 import operators_pb2, operators_pb2_grpc
from protos.rounding import Array
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

CLIENTS = 200
SIDE = 512
"""The base model's modules are square. 1 MB is 16 of them at rank 16, 16 MB all 64 at rank 64."""
PHASE_LIMIT_S = 100.0
"""A phase that takes longer ends the run with an error."""
TRIES = 5


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
    retries: int

    @property
    def bytes_per_s(self) -> float:
        return self.updates * self.size_bytes / self.wall_s


def module_name(number: int) -> str:
    return f"model.layers.{number}.self_attn.q_proj"


async def drive(seed: int) -> None:
    """Read requests from stdin, answer each with one line."""
    fleet = Fleet(seed)
    while line := await asyncio.to_thread(sys.stdin.readline):
        request = json.loads(line)
        answer: Any = {}
        if request["do"] == "enroll":
            await fleet.enroll(Path(request["pki"]), request["ports"])
        elif request["do"] == "payload":
            fleet.rank = request["rank"]
            fleet.payload = make_payload(fleet.rank, request["modules"], seed)
        else:
            fleet.link_bytes_per_s = request.get("link", math.inf)
            phase = await asyncio.wait_for(
                fleet.send(request["port"], request["each"], request["label"]), PHASE_LIMIT_S
            )
            answer = asdict(phase)
        print(json.dumps(answer), flush=True)


def make_payload(rank: int, modules: int, seed: int) -> bytes:
    """A valid update; its last four bytes are a value that each sent update changes."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return (random.standard_normal(shape) * 0.01).astype(np.float32)

    return encode(
        LoraTensors(
            {
                module_name(i): LoraModule(draw(rank, SIDE), draw(SIDE, rank), 1.0)
                for i in range(modules)
            }
        )
    )


class Fleet:
    """The 200 nodes."""

    def __init__(self, seed: int) -> None:
        self.payload = b""
        self.rank = 0
        self.link_bytes_per_s = math.inf
        """Of each node."""
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
            request = operators_pb2.CreateTokenRequest(cohort="shared", uses=CLIENTS, valid_s=3600)
            token = (
                await operators_pb2_grpc.OperatorServiceStub(channel).CreateToken(
                    request, timeout=30
                )
            ).token
        parsed = JoinToken.parse(token)
        address = f"localhost:{ports[1]}"
        base = (await asyncio.to_thread(read_base_model, pki.parent.parent / "base")).digest
        async with grpc.aio.secure_channel(
            address, grpc.ssl_channel_credentials(self._ca)
        ) as channel:
            stub = fleet_pb2_grpc.EnrollmentServiceStub(channel)
            for number in range(CLIENTS):
                self._clients.append(
                    await enroll(stub, parsed.token_id, parsed.secret, base, f"n{number}")
                )
                show("enrolling", number + 1, CLIENTS)

    async def send(self, port: int, each: int, label: str) -> Phase:
        """Every client sends `each` updates, one after the other, all clients at once."""
        channels = await self._connect(port)
        # Signing is the node's own work: done before the clock runs.
        work = [[self._prepare(client) for _ in range(each)] for client in self._clients]
        latencies: list[float] = []
        retries = 0
        started = time.perf_counter()

        async def client(
            channel: grpc.aio.Channel, updates: list[tuple[bytes, bytes, bytes]]
        ) -> None:
            nonlocal retries
            for update in updates:
                began = time.perf_counter()
                retries += await self._upload(channel, *update)
                latencies.append(time.perf_counter() - began)
                show(label, len(latencies), CLIENTS * each)

        async with asyncio.TaskGroup() as tasks:
            for channel, updates in zip(channels, work, strict=True):
                tasks.create_task(client(channel, updates))
        return Phase(
            len(latencies), len(self.payload), time.perf_counter() - started, latencies, retries
        )

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
        """Manifest, signature, and four last bytes that make this payload unlike any other."""
        self._sequence += 1
        tail = np.float32(self._sequence * 1e-6).tobytes()
        payload = self.payload[:-4] + tail
        genesis = client.genesis
        manifest = UpdateManifest(
            node_id=client.node_id,
            sequence=self._sequence,
            base=genesis.base,
            start=Start(
                release=genesis.digest,
                payload=genesis.payload.digest_sha256,
                prefix_rank=0,
                dtype="float32",
            ),
            rank=self.rank,
            payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
            round_id=f"round-{self._sequence}",
            experiences=1,
            created_at="2026-11-22T12:00:00Z",
            software="benchmarks.intake",
        ).to_bytes()
        return manifest, sign(client.key, manifest), tail

    async def _upload(
        self, channel: grpc.aio.Channel, manifest: bytes, signature: bytes, tail: bytes
    ) -> int:
        """Until central has answered with a receipt; how often it had to be repeated."""
        stub = updates_pb2_grpc.UpdateServiceStub(channel)
        offset = 0
        for retry in range(TRIES):
            try:
                parts = self._parts(manifest, signature, tail, offset)
                answer = await stub.Upload(parts, timeout=PHASE_LIMIT_S)
                if answer.receipt.body:
                    return retry
            except grpc.aio.AioRpcError as error:
                print(f"\n{error.code().name}: {error.details()}", file=sys.stderr)
            query = updates_pb2.QueryUploadRequest(update_id=sha256_hex(manifest))
            offset = (await stub.QueryUpload(query, timeout=PHASE_LIMIT_S)).committed_bytes
        raise SystemExit(f"An update had no receipt after {TRIES} tries.")

    async def _parts(
        self, manifest: bytes, signature: bytes, tail: bytes, offset: int
    ) -> AsyncIterator[updates_pb2.UploadRequest]:
        yield updates_pb2.UploadRequest(
            header=updates_pb2.UploadHeader(manifest=manifest, signature=signature, offset=offset)
        )
        for begin in range(offset, len(self.payload), CHUNK_BYTES):
            chunk = self.payload[begin : begin + CHUNK_BYTES]
            if begin + CHUNK_BYTES >= len(self.payload):
                chunk = chunk[:-4] + tail
            if self.link_bytes_per_s < math.inf:
                await asyncio.sleep(len(chunk) / self.link_bytes_per_s)
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


def show(label: str, done: int, total: int) -> None:
    """A progress bar on stderr."""
    if done == total or done % 20 == 0:
        filled = 30 * done // total
        end = "\n" if done == total else ""
        print(
            f"\r{label:12s} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}",
            end=end,
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(drive(parser.parse_args().seed))


if __name__ == "__main__":
    main()
