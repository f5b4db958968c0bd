"""A real central on real ports for contract tests: every service, mutual TLS, no Flower loop.

In: a temporary directory. Out: channels of enrolled nodes and of the operator.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from safetensors.numpy import save_file

from central.fleet.presence import Presence
from central.fleet.tokens import PREFIX
from central.journal import EventKind, NewEvent
from central.rooms import Rooms, open_rooms
from central.server import Services
from central.settings import CentralSettings
from edge_node.identity import JoinToken
from examples.ports import free_port
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, Start, UpdateManifest, sha256_hex, sign
from protos.operators.v1 import operators_pb2, operators_pb2_grpc
from protos.releases.v1 import releases_pb2_grpc
from protos.updates.v1 import updates_pb2, updates_pb2_grpc
from tests.unit.central import builders as make

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"
SHAPES = {Q_PROJ: (8, 8), DOWN_PROJ: (8, 16)}
Run = Callable[..., tuple[int, str]]
"""A command of central, run with a data directory, arguments and settings: see conftest.run."""


def make_base(folder: Path, seed: int = 0) -> Path:
    """A model directory with two linear modules; its weights are never used."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps({"seed": seed}))
    save_file(
        {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in SHAPES.items()},
        folder / "model.safetensors",
    )
    return folder


def make_factors(seed: int = 0, rank: int = 2) -> LoraTensors:
    random = np.random.default_rng(seed)
    return LoraTensors(
        {
            name: LoraModule(
                random.standard_normal((rank, shape[1])).astype(np.float32),
                random.standard_normal((shape[0], rank)).astype(np.float32),
                2.0,
            )
            for name, shape in SHAPES.items()
        }
    )


@dataclass
class Node:
    """An enrolled node as the wire sees it."""

    node_id: str
    key: ec.EllipticCurvePrivateKey
    answer: fleet_pb2.EnrollResponse
    channel: grpc.aio.Channel

    @property
    def genesis(self) -> ReleaseManifest:
        return ReleaseManifest.from_bytes(self.answer.genesis.manifest)

    @property
    def updates(self) -> updates_pb2_grpc.UpdateServiceStub:
        return updates_pb2_grpc.UpdateServiceStub(self.channel)

    @property
    def releases(self) -> releases_pb2_grpc.ReleaseServiceStub:
        return releases_pb2_grpc.ReleaseServiceStub(self.channel)

    @property
    def fleet(self) -> fleet_pb2_grpc.FleetServiceStub:
        return fleet_pb2_grpc.FleetServiceStub(self.channel)

    def manifest(self, data: bytes, sequence: int = 1, **fields: Any) -> UpdateManifest:
        genesis = self.genesis
        values: dict[str, Any] = {
            "node_id": self.node_id,
            "sequence": sequence,
            "base": genesis.base,
            "start": Start(
                release=genesis.digest,
                payload=genesis.payload.digest_sha256,
                prefix_rank=0,
                dtype="float32",
            ),
            "rank": 2,
            "payload": Payload(digest_sha256=sha256_hex(data), size_bytes=len(data)),
            "round_id": f"round-{sequence}",
            "experiences": 5,
            "created_at": "2026-11-22T12:00:00Z",
            "software": "tests",
        }
        return UpdateManifest.model_validate({**values, **fields})

    async def upload(
        self,
        payload: bytes,
        manifest: UpdateManifest | None = None,
        *,
        offset: int = 0,
        stop: int | None = None,
        signature: bytes | None = None,
    ) -> updates_pb2.Receipt:
        """Send payload[offset:stop] in chunks; again when gRPC lost the answer, as a node does."""
        data = (manifest or self.manifest(payload)).to_bytes()

        async def parts() -> AsyncIterator[updates_pb2.UploadRequest]:
            header = updates_pb2.UploadHeader(
                manifest=data, signature=signature or sign(self.key, data), offset=offset
            )
            yield updates_pb2.UploadRequest(header=header)
            end = len(payload) if stop is None else stop
            for begin in range(offset, end, 300):
                yield updates_pb2.UploadRequest(chunk=payload[begin : min(begin + 300, end)])

        while True:
            try:
                return (await self.updates.Upload(parts(), timeout=20)).receipt
            except grpc.aio.AioRpcError as error:
                # A chunk written while the refusal arrives fails with this and hides the refusal.
                if error.details() != "Internal error from Core":
                    raise

    async def begin(
        self, payload: bytes, sequence: int = 1, stop: int | None = None
    ) -> grpc.aio.StreamUnaryCall[updates_pb2.UploadRequest, updates_pb2.UploadResponse]:
        """An upload that sends payload[:stop] in one chunk, or no chunk, and then waits."""
        data = self.manifest(payload, sequence).to_bytes()
        call = self.updates.Upload(timeout=20)
        header = updates_pb2.UploadHeader(manifest=data, signature=sign(self.key, data), offset=0)
        await write(call, updates_pb2.UploadRequest(header=header))
        if chunk := payload[:stop]:
            await write(call, updates_pb2.UploadRequest(chunk=chunk))
        return call

    async def query(self, update_id: str) -> updates_pb2.QueryUploadResponse:
        return await self.updates.QueryUpload(
            updates_pb2.QueryUploadRequest(update_id=update_id), timeout=20
        )


@dataclass
class Central:
    """The running services with their rooms."""

    rooms: Rooms
    settings: CentralSettings
    stack: AsyncExitStack

    @property
    def operators(self) -> operators_pb2_grpc.OperatorServiceStub:
        folder = self.settings.data_dir / "pki"
        return operators_pb2_grpc.OperatorServiceStub(
            self.channel(
                (folder / "operator.key").read_bytes(), (folder / "operator.pem").read_bytes()
            )
        )

    def channel(
        self, key: bytes | None = None, certificate: bytes | None = None, port: int | None = None
    ) -> grpc.aio.Channel:
        """`port`: of a relay to central, if not central's own."""
        credentials = grpc.ssl_channel_credentials(self.rooms.pki.ca_pem, key, certificate)
        channel = grpc.aio.secure_channel(
            f"localhost:{port or self.settings.listen.port}", credentials
        )
        self.stack.push_async_callback(channel.close)
        return channel

    async def token(self, cohort: str = "shared", uses: int = 10) -> JoinToken:
        request = operators_pb2.CreateTokenRequest(cohort=cohort, uses=uses, valid_s=3600)
        text = (await self.operators.CreateToken(request, timeout=20)).token
        assert text.startswith(PREFIX)
        return JoinToken.parse(text)

    async def enroll(
        self,
        name: str,
        token: JoinToken,
        key: ec.EllipticCurvePrivateKey | None = None,
        **changed: Any,
    ) -> Node:
        key = key or ec.generate_private_key(ec.SECP256R1())
        address = f"localhost:{self.settings.listen.enrollment_port}"
        answer = await join(
            address, name, token, key, **{"base_digest": self.rooms.base.digest, **changed}
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Node(answer.node_id, key, answer, self.channel(pem, answer.certificate_pem))


async def join(
    address: str, name: str, token: JoinToken, key: ec.EllipticCurvePrivateKey, **fields: Any
) -> fleet_pb2.EnrollResponse:
    """What a node of this name gets for its token; `fields` replace those of its request."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
    made = {
        "token_id": token.token_id,
        "token_secret": token.secret,
        "csr_pem": request.public_bytes(Encoding.PEM),
        "node_name": name,
    }
    async with grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(token.ca_pem)
    ) as channel:
        stub = fleet_pb2_grpc.EnrollmentServiceStub(channel)
        return await stub.Enroll(fleet_pb2.EnrollRequest(**{**made, **fields}), timeout=20)


def make_settings(folder: Path, **groups: Mapping[str, Any]) -> CentralSettings:
    ports = [free_port(), free_port()]
    base = folder / "base"
    return CentralSettings.model_validate(
        {
            "data_dir": folder / "central",
            "base": {"path": base if base.is_dir() else make_base(base)},
            "listen": {"port": ports[0], "enrollment_port": ports[1]},
            **groups,
        }
    )


@asynccontextmanager
async def running_central(
    settings: CentralSettings,
    heartbeat_s: float = 10.0,
    failure: Callable[[str], str] = lambda cohort: "",
) -> AsyncIterator[Central]:
    with ExitStack() as stores:
        rooms = await asyncio.to_thread(open_rooms, settings, stores)
        async with (
            Services(rooms, settings, Presence(), heartbeat_s, failure),
            AsyncExitStack() as stack,
        ):
            yield Central(rooms, settings, stack)


@asynccontextmanager
async def limited_central(folder: Path) -> AsyncIterator[Central]:
    """With limits that small payloads can pass."""
    settings = make_settings(folder, limits={"max_rank": 4, "node_quota_bytes": 6000})
    async with running_central(settings) as running:
        yield running


async def write(
    call: grpc.aio.StreamUnaryCall[updates_pb2.UploadRequest, updates_pb2.UploadResponse],
    request: updates_pb2.UploadRequest,
) -> None:
    """Sends `request`, or nothing where central ended the call: awaiting the call says why."""
    with suppress(asyncio.InvalidStateError):
        await call.write(request)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str | None, str]:
    """Status, reason and text of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), reason(caught.value), caught.value.details() or ""


async def make_candidate(
    central: Central, node: Node, payload: bytes, large: bool = False
) -> tuple[str, bytes]:
    """Id and payload of a candidate from one uploaded update; `large`: 8 MB, more than a buffer."""
    await node.upload(payload)
    plan = make.make_plan(node.genesis, node.manifest(payload))
    await asyncio.to_thread(central.rooms.journal.append, make.planned(plan))
    merged = encode(LoraTensors({Q_PROJ: make_factors(9, 1 << 17 if large else 2).modules[Q_PROJ]}))
    manifest = await asyncio.to_thread(
        central.rooms.registry.add_candidate, plan.digest, merged, 0.25
    )
    assert manifest == await asyncio.to_thread(
        central.rooms.registry.add_candidate, plan.digest, merged, 0.25
    )
    return manifest.digest, merged


async def accept(central: Central, release_id: str) -> None:
    """The release is accepted and stable, as after its gate."""
    body = {"accepted": True, "text": "fine", "environments": {}, "high_water": {}}
    await asyncio.to_thread(
        central.rooms.journal.append,
        NewEvent(EventKind.VERDICT, "shared", release_id, body),
        NewEvent(EventKind.PROMOTED, "shared", release_id, {"channel": "stable", "by": "gate"}),
    )


def encode_factors(seed: int = 0, rank: int = 2) -> bytes:
    return encode(make_factors(seed, rank))


def reason(error: grpc.aio.AioRpcError) -> str | None:
    return dict(error.trailing_metadata() or ()).get("lorikeet-reason")
