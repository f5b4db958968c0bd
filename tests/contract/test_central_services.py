"""Central's services on real servers with mutual TLS: an upload from its start to its receipt."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from central.errors import ListenError, Reason, Refused, StorageError
from central.fleet.presence import Presence
from central.intake.admission import Admission
from central.journal import EventKind
from central.server import Services
from protos.manifest import ReceiptBody, verify
from protos.updates.v1 import updates_pb2
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    refusal,
)
from tests.unit.central import builders as make


async def test_a_cut_upload_goes_on_and_a_repeat_gets_the_same_receipt(
    central: Central, node: Node
) -> None:
    payload = encode_factors()
    manifest = node.manifest(payload)
    code, why, _ = await refusal(node.upload(payload, stop=700))
    assert (code, why) == (grpc.StatusCode.ABORTED, "WRONG_OFFSET")
    assert (await node.query(manifest.digest)).committed_bytes == 700
    _, why, _ = await refusal(node.upload(payload, offset=500))
    assert why == "WRONG_OFFSET"
    receipt = await node.upload(payload, offset=700)
    verify(node.answer.release_key_pem, receipt.body, receipt.signature)
    body = ReceiptBody.from_bytes(receipt.body)
    assert (body.update_id, body.node_id) == (manifest.digest, node.node_id)
    event = central.rooms.journal.events(body.journal_sequence - 1, 1)[0]
    assert (event.kind, event.subject, event.hash) == (
        EventKind.UPDATE_ADMITTED,
        manifest.digest,
        body.journal_hash,
    )
    assert await node.upload(payload) == receipt
    known = await node.query(manifest.digest)
    assert (known.receipt, known.state) == (receipt, updates_pb2.UPDATE_STATE_WAITING)
    assert central.rooms.blobs.read(manifest.payload.digest_sha256) == payload
    with central.rooms.journal.read() as state:
        assert [update.update_id for update in state.waiting("shared")] == [manifest.digest]


async def test_a_journal_that_fails_costs_no_byte_twice(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()

    def fail(*_: object) -> None:
        raise StorageError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(central.rooms.journal, "append", fail)
        assert (await refusal(node.upload(payload)))[:2] == (
            grpc.StatusCode.UNAVAILABLE,
            "STORAGE_FAILED",
        )
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == len(payload)
    assert await node.upload(payload, offset=len(payload))
    assert not list(central.settings.data_dir.rglob("*.part"))


@pytest.mark.parametrize(
    ("status", "kept"),
    [(grpc.StatusCode.FAILED_PRECONDITION, False), (grpc.StatusCode.RESOURCE_EXHAUSTED, True)],
)
async def test_what_is_refused_at_the_last_step_stays_only_for_who_may_try_again(
    central: Central,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    status: grpc.StatusCode,
    kept: bool,
) -> None:
    payload = encode_factors()

    def refuse(*_: object) -> None:
        raise Refused(status, Reason.UNKNOWN_START, "Its start was collected while it came.")

    monkeypatch.setattr(Admission, "_check_kept", refuse)
    assert (await refusal(node.upload(payload)))[:2] == (status, "UNKNOWN_START")
    expected = len(payload) if kept else 0
    assert central.rooms.uploads.held_bytes(node.node_id, "", ()) == expected
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == expected


async def test_a_node_sees_only_its_own_updates(central: Central, node: Node) -> None:
    other = await central.enroll("b", await central.token())
    payload = encode_factors()
    await node.upload(payload)
    answer = await other.query(node.manifest(payload).digest)
    assert (answer.committed_bytes, answer.HasField("receipt")) == (0, False)
    _, why, _ = await refusal(other.upload(payload, node.manifest(payload)))
    assert why == "BAD_MANIFEST"


async def test_the_newest_update_of_a_start_counts(central: Central, node: Node) -> None:
    payloads = [encode_factors(seed) for seed in range(4)]
    manifests = [node.manifest(payload, number) for number, payload in enumerate(payloads, start=1)]
    for index in (1, 0, 2):  # the first one is overtaken by the second
        await node.upload(payloads[index], manifests[index])
    plan = make.make_plan(node.genesis, manifests[2])
    await asyncio.to_thread(central.rooms.journal.append, make.planned(plan))
    await node.upload(payloads[3], manifests[3])
    with central.rooms.journal.read() as state:
        states = [state.updates[manifest.digest].state for manifest in manifests]
        assert "already merged" in state.updates[manifests[3].digest].reason
    assert states == ["superseded", "superseded", "planned", "set_aside"]


async def test_a_taken_port_is_named(central: Central) -> None:
    with pytest.raises(ListenError, match=str(central.settings.listen.port)):
        async with Services(central.rooms, central.settings, Presence()):
            pass
