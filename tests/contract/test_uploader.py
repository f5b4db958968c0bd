"""The uploader against a real grpc.aio server whose UpdateService follows a script."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.identity import Identity
from edge_node.outbox import Outbox, OutboxEntry, OutboxState, Uploader
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from protos.manifest import (
    CHUNK_BYTES,
    Payload,
    ReceiptBody,
    Start,
    UpdateManifest,
    sha256_hex,
    sign,
)
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

NODE_KEY = ec.generate_private_key(ec.SECP256R1())
RELEASE_KEY = ec.generate_private_key(ec.SECP256R1())
NODE_ID = "node-a-0badcafe"
SETTINGS = EdgeSettings.model_validate({"central": {"call_timeout_s": 5}, "outbox": {"retry_s": 0.5}})
IDENTITY = Identity(
    node_id=NODE_ID,
    cohort="shared",
    base="0" * 64,
    key=NODE_KEY,
    certificate_pem=b"",
    ca_pem=b"",
    release_key_pem=RELEASE_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' data directory, where problems are kept, is relative."""
    monkeypatch.chdir(tmp_path)


def trouble() -> str:
    """What room `uploads` says is wrong."""
    return "".join(problem.text for problem in Problems(SETTINGS.data_dir).current() if problem.room == "uploads")


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
    """Keeps committed bytes as central does; a script may act on each chunk, before it is committed."""

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
        return updates_pb2.QueryUploadResponse(committed_bytes=len(self.committed.get(update_id, b"")))

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


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path, "auto")


@asynccontextmanager
async def node(outbox: Outbox, port: int, clock: Clock) -> AsyncIterator[Uploader]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Uploader(outbox, channel, IDENTITY, SETTINGS, clock)


async def test_admitted_update_keeps_the_receipt_and_drops_the_payload(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    payload = bytes(range(256)) * 12_000  # three chunks
    update_id = add_update(outbox, 1, payload)
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
    assert central.admitted == {update_id: payload}
    (entry,) = outbox.list()
    assert entry.state == OutboxState.ADMITTED
    body, signature = outbox.receipt(update_id)
    assert (body, len(signature) > 0) == (central.receipt(update_id).body, True)
    assert not outbox.payload_path("r1").exists()


async def test_cut_stream_goes_on_from_the_committed_byte(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    payload = bytes(range(251)) * 20_000

    async def cut(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        if number == 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")

    update_id = add_update(outbox, 1, payload)
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        central.script = cut
        await uploader.upload_waiting()
        assert outbox.list()[0].state == OutboxState.WAITING
        assert "could not be uploaded" in trouble()  # gRPC may call a cut INTERNAL when it hits a write
        central.script = None
        await uploader.upload_waiting()
        assert len(central.uploads) == 1, "it waits for its backoff"
        clock.now = 10
        await uploader.upload_waiting()
    assert central.offsets == [0, 2 * CHUNK_BYTES]
    assert central.admitted == {update_id: payload}
    assert outbox.list()[0].state == OutboxState.ADMITTED
    assert trouble() == ""


async def test_restart_of_both_sides_loses_no_committed_byte(outbox: Outbox, tmp_path: Path) -> None:
    central, clock = ScriptedCentral(), Clock()
    payload = b"x" * (3 * CHUNK_BYTES)

    async def cut(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        if number == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "central stops")

    update_id = add_update(outbox, 1, payload)
    central.script = cut
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
    central.script = None
    reopened = Outbox(tmp_path, "auto")
    async with node(reopened, port, clock) as uploader:
        await uploader.upload_waiting()  # nobody answers
        assert reopened.list()[0].state == OutboxState.WAITING
    async with serving(central, port), node(reopened, port, clock) as uploader:
        await uploader.upload_waiting()
    assert central.offsets == [0, CHUNK_BYTES]
    assert central.admitted == {update_id: payload}


async def test_lost_receipt_is_asked_for_and_nothing_is_sent_twice(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    central.lose_next_receipt = True
    add_update(outbox, 1, b"payload")
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert outbox.list()[0].state == OutboxState.WAITING
        clock.now = 10
        await uploader.upload_waiting()
    assert outbox.list()[0].state == OutboxState.ADMITTED
    assert len(central.uploads) == 1


async def test_final_refusal_is_kept_with_its_reason_and_blocks_nobody(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    refused, stuck, good = (add_update(outbox, number, b"p%d" % number) for number in range(3))

    async def script(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        if update_id == refused:
            context.set_trailing_metadata((("lorikeet-reason", "NOT_FINITE"),))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "module q_proj holds NaN")
        if update_id == stuck:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")

    central.script = script
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        clock.now = 10
        await uploader.upload_waiting()
    entries = {entry.update_id: entry for entry in outbox.list()}
    assert entries[refused].state == OutboxState.REFUSED
    assert entries[refused].reason == "NOT_FINITE: module q_proj holds NaN"
    assert entries[stuck].state == OutboxState.WAITING
    assert entries[good].state == OutboxState.ADMITTED
    assert central.uploads == [refused, stuck, good, stuck]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_OFFSET"),
        (grpc.StatusCode.PERMISSION_DENIED, "REVOKED_NODE"),
        (grpc.StatusCode.PERMISSION_DENIED, ""),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL"),
        (grpc.StatusCode.UNAVAILABLE, "STORAGE_FULL"),
        (grpc.StatusCode.ABORTED, "SILENT_STREAM"),
    ],
)
async def test_passing_failure_is_tried_again(outbox: Outbox, status: grpc.StatusCode, reason: str) -> None:
    central, clock = ScriptedCentral(), Clock()

    async def script(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        context.set_trailing_metadata((("lorikeet-reason", reason),) if reason else ())
        await context.abort(status, "not now")

    add_update(outbox, 1, b"payload")
    central.script = script
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
    assert outbox.list()[0].state == OutboxState.WAITING


async def test_forged_receipt_admits_nothing(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    central.signing_key = NODE_KEY
    add_update(outbox, 1, b"payload")
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert outbox.list()[0].state == OutboxState.WAITING
        assert "receipt" in trouble()
        central.signing_key = RELEASE_KEY
        clock.now = 10
        await uploader.upload_waiting()
    assert outbox.list()[0].state == OutboxState.ADMITTED


async def test_held_update_never_leaves(tmp_path: Path) -> None:
    central, clock = ScriptedCentral(), Clock()
    outbox = Outbox(tmp_path, "manual")
    update_id = add_update(outbox, 1, b"payload")
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert not central.uploads
        outbox.approve(update_id)
        await uploader.upload_waiting()
    assert list(central.admitted) == [update_id]


async def test_silent_central_costs_one_deadline(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    never = asyncio.Event()

    async def silence(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        await never.wait()

    add_update(outbox, 1, b"payload")
    central.script = silence
    impatient = EdgeSettings.model_validate({"central": {"call_timeout_s": 0.3}})
    async with serving(central) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        uploader = Uploader(outbox, channel, IDENTITY, impatient, clock)
        await asyncio.wait_for(uploader.upload_waiting(), 5)
        assert outbox.list()[0].state == OutboxState.WAITING
        assert "Timeout" in trouble()


async def test_run_uploads_what_another_process_adds_and_ends_with_aclose(outbox: Outbox, tmp_path: Path) -> None:
    central, clock = ScriptedCentral(), Clock()
    quick = EdgeSettings.model_validate({"outbox": {"retry_s": 0.01}})
    async with serving(central) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        uploader = Uploader(outbox, channel, IDENTITY, quick, clock)
        running = asyncio.create_task(uploader.run())
        add_update(Outbox(tmp_path, "auto"), 1, b"payload")
        async with asyncio.timeout(5):
            while not outbox.list(OutboxState.ADMITTED):
                await asyncio.sleep(0.01)
        await uploader.aclose()
        await uploader.aclose()
        await asyncio.wait_for(running, 5)


async def test_an_outbox_that_cannot_be_read_for_a_while_ends_nothing(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    central, real = ScriptedCentral(), outbox.list
    failures = [sqlite3.OperationalError("database is locked"), OSError("disk")]

    def listing(*states: OutboxState) -> Sequence[OutboxEntry]:
        if failures:
            raise failures.pop()
        return real(*states)

    monkeypatch.setattr(outbox, "list", listing)
    update_id = add_update(outbox, 1, b"payload")
    async with serving(central) as port, node(outbox, port, Clock()) as uploader:
        running = asyncio.create_task(uploader.run())
        async with asyncio.timeout(20):
            while update_id not in central.admitted:
                assert not running.done(), running.result()
                await asyncio.sleep(0.02)
        await uploader.aclose()
        await running


async def test_one_update_that_arrives_does_not_hide_one_that_does_not(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    first = add_update(outbox, 1, b"one")
    add_update(outbox, 2, b"two")

    async def refuse_the_first(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        if update_id == first:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    central.script = refuse_the_first
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert f"Update {first[:12]} could not be uploaded" in trouble()
        [problem] = Problems(SETTINGS.data_dir).current()
        assert "edge-node doctor" in problem.next_step
        central.script, clock.now = None, 100
        await uploader.upload_waiting()
        assert trouble() == ""


async def test_a_refused_update_is_a_problem_until_a_later_one_is_admitted_also_after_a_restart(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    refused = add_update(outbox, 1, b"one")

    async def refuse(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        context.set_trailing_metadata((("lorikeet-reason", "BAD_TENSOR"),))
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "module q has NaN")

    central.script = refuse
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
    expected = f"Central refused update {refused[:12]} (#1) for good: BAD_TENSOR: module q has NaN"
    assert trouble() == expected
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert trouble() == expected, "nothing waits, and nothing has been admitted since"
        central.script = None
        add_update(outbox, 2, b"two")
        await uploader.upload_waiting()
    assert trouble() == ""


async def test_an_outbox_that_cannot_be_read_is_a_problem_while_it_lasts(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = EdgeSettings.model_validate({"outbox": {"retry_s": 0.01}})
    broken = [True]
    real = outbox.list

    def listing(*states: OutboxState) -> Sequence[OutboxEntry]:
        if broken:
            raise sqlite3.OperationalError("disk I/O error")
        return real(*states)

    monkeypatch.setattr(outbox, "list", listing)
    async with serving(ScriptedCentral()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        uploader = Uploader(outbox, channel, IDENTITY, quick)
        running = asyncio.create_task(uploader.run())
        async with asyncio.timeout(5):
            while "disk I/O error" not in trouble():
                await asyncio.sleep(0.01)
            broken.clear()
            while trouble():
                await asyncio.sleep(0.01)
        await uploader.aclose()
        await running
