"""An UpdateService that follows a script, on a real grpc.aio server; a node uploads to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.identity import Identity
from edge_node.outbox import Outbox, Uploader
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.manifest import Payload, ReceiptBody, Start, UpdateManifest, sha256_hex, sign
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

NODE_KEY = ec.generate_private_key(ec.SECP256R1())


RELEASE_KEY = ec.generate_private_key(ec.SECP256R1())


NODE_ID = "node-a-0badcafe"


SETTINGS = EdgeSettings.model_validate(
    {"central": {"call_timeout_s": 5}, "outbox": {"retry_s": 0.5}}
)


IDENTITY = Identity(
    node_id=NODE_ID,
    cohort="shared",
    base="0" * 64,
    key=NODE_KEY,
    certificate_pem=b"",
    ca_pem=b"",
    release_key_pem=RELEASE_KEY.public_key().public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    ),
)


def trouble() -> str:
    """What room `uploads` says is wrong."""
    return "".join(
        problem.text
        for problem in Problems(SETTINGS.data_dir).current()
        if problem.room == "uploads"
    )


def add_update(outbox: Outbox, number: int, payload: bytes) -> str:
    manifest = UpdateManifest(
        node_id=NODE_ID,
        sequence=outbox.next_sequence(),
        base="0" * 64,
        start=Start(release="1" * 64, payload="2" * 64, prefix_rank=0, dtype="float32"),
        rank=4,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        round_id=f"r{number}",
        experiences=1,
        created_at="2026-11-22T00:00:00Z",
        software="test",
    ).to_bytes()
    return outbox.add(f"r{number}", manifest, sign(NODE_KEY, manifest), payload)


class ScriptedCentral(updates_pb2_grpc.UpdateServiceServicer):
    """Keeps committed bytes as central does; a script may act on each chunk before that."""

    def __init__(self) -> None:
        self.committed: dict[str, bytes] = {}
        self.admitted: dict[str, bytes] = {}
        self.offsets: list[int] = []
        self.uploads: list[str] = []
        self.signing_key = RELEASE_KEY
        self.lose_next_receipt = False
        self.script: Callable[[str, int, grpc.aio.ServicerContext], Awaitable[None]] | None = None

    def receipt(self, update_id: str) -> updates_pb2.Receipt:
        body = ReceiptBody(
            update_id=update_id,
            node_id=NODE_ID,
            payload=sha256_hex(self.admitted[update_id]),
            admitted_at="2026-11-22T00:00:00Z",
            journal_sequence=1,
            journal_hash="3" * 64,
        ).to_bytes()
        return updates_pb2.Receipt(body=body, signature=sign(self.signing_key, body))

    async def QueryUpload(self, request, context):
        update_id = request.update_id
        if update_id in self.admitted:
            return updates_pb2.QueryUploadResponse(receipt=self.receipt(update_id))
        return updates_pb2.QueryUploadResponse(
            committed_bytes=len(self.committed.get(update_id, b""))
        )

    async def Upload(self, request_iterator, context):
        header = (await anext(request_iterator)).header
        update_id = sha256_hex(header.manifest)
        self.uploads.append(update_id)
        self.offsets.append(header.offset)
        held = self.committed.setdefault(update_id, b"")
        assert header.offset == len(held)
        number = 0
        async for request in request_iterator:
            if self.script is not None:
                await self.script(update_id, number, context)
            self.committed[update_id] += request.chunk
            number += 1
        if self.script is not None:
            await self.script(update_id, -1, context)
        self.admitted[update_id] = self.committed[update_id]
        if self.lose_next_receipt:
            self.lose_next_receipt = False
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        return updates_pb2.UploadResponse(receipt=self.receipt(update_id))


@asynccontextmanager
async def serving(central: ScriptedCentral, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server()
    updates_pb2_grpc.add_UpdateServiceServicer_to_server(central, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def node(outbox: Outbox, port: int, clock: Clock) -> AsyncIterator[Uploader]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Uploader(outbox, channel, IDENTITY, SETTINGS, clock)
