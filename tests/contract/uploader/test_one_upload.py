"""One update on its way: cut streams, lost and forged receipts, refusals, restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from edge_node.outbox import Outbox, OutboxState, Uploader
from edge_node.settings import EdgeSettings
from protos.manifest import CHUNK_BYTES
from tests.contract.uploader.scripted_central import (
    IDENTITY,
    NODE_KEY,
    RELEASE_KEY,
    Clock,
    ScriptedCentral,
    add_update,
    node,
    serving,
    trouble,
)


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
        assert (
            "could not be uploaded" in trouble()
        )  # gRPC may call a cut INTERNAL when it hits a write
        central.script = None
        await uploader.upload_waiting()
        assert len(central.uploads) == 1, "it waits for its backoff"
        clock.now = 10
        await uploader.upload_waiting()
    assert central.offsets == [0, 2 * CHUNK_BYTES]
    assert central.admitted == {update_id: payload}
    assert outbox.list()[0].state == OutboxState.ADMITTED
    assert trouble() == ""


async def test_restart_of_both_sides_loses_no_committed_byte(
    outbox: Outbox, tmp_path: Path
) -> None:
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
async def test_passing_failure_is_tried_again(
    outbox: Outbox, status: grpc.StatusCode, reason: str
) -> None:
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
