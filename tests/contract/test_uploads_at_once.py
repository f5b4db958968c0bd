"""Uploads at once, and what changes while a payload comes: nothing is lost or counted twice."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from central import faults
from central.intake import admission
from central.intake.uploads import Uploads
from central.journal import EventKind, NewEvent
from protos.manifest import sha256_hex
from protos.operators.v1 import operators_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    reason,
    refusal,
    write,
)


async def try_again(node: Node, payload: bytes) -> updates_pb2.Receipt:
    """As a node does after a refusal that passes: it asks, and goes on from there."""
    known = await node.query(node.manifest(payload).digest)
    if known.HasField("receipt"):
        return known.receipt
    return await node.upload(payload, offset=known.committed_bytes)


async def test_two_uploads_of_one_update_admit_it_once(central: Central, node: Node) -> None:
    payload = encode_factors()
    results = await asyncio.gather(
        *(node.upload(payload) for _ in range(4)), return_exceptions=True
    )
    reasons = {reason(result) for result in results if isinstance(result, grpc.aio.AioRpcError)}
    assert reasons <= {"TAKEN_OVER", "WRONG_OFFSET"}, results
    # All four may be refused: see the next test.
    receipts = [result for result in results if isinstance(result, updates_pb2.Receipt)]
    receipts.append(await try_again(node, payload))
    assert len({receipt.body for receipt in receipts}) == 1
    assert admissions(central) == 1


async def test_a_stream_that_is_taken_over_leaves_its_bytes_to_the_next(
    central: Central, node: Node
) -> None:
    """The newer stream does not begin where they end, so both are refused, and the node asks."""
    payload, uploads = encode_factors(), central.rooms.uploads
    update_id = node.manifest(payload).digest
    older = await node.begin(payload, stop=300)
    while await asyncio.to_thread(uploads.committed, node.node_id, update_id) < 300:
        await asyncio.sleep(0.01)
    newer = await refusal(node.upload(payload))
    assert (await refusal(older))[1] == "TAKEN_OVER"
    assert newer[:2] == (grpc.StatusCode.ABORTED, "WRONG_OFFSET")
    assert "central has 300. Ask QueryUpload" in newer[2]
    assert (await try_again(node, payload)).body
    assert admissions(central) == 1


def admissions(central: Central) -> int:
    kinds = [event.kind for event in central.rooms.journal.events()]
    return kinds.count(EventKind.UPDATE_ADMITTED)


async def test_bytes_cannot_change_between_their_check_and_their_keeping(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()
    update_id = node.manifest(payload).digest
    threads: list[threading.Thread] = []

    check_payload = admission.check_payload

    def check(*arguments: Any) -> None:
        check_payload(*arguments)
        # Another stream of the same update, just now.
        threads.append(
            threading.Thread(target=central.rooms.uploads.discard, args=(node.node_id, update_id))
        )
        threads[0].start()
        threads[0].join(0.2)

    monkeypatch.setattr(admission, "check_payload", check)
    assert await node.upload(payload)
    threads[0].join(10)
    assert central.rooms.blobs.read(sha256_hex(payload)) == payload


async def test_what_changes_while_a_payload_comes_is_seen_before_it_is_kept(
    central: Central, node: Node
) -> None:
    payloads = [encode_factors(seed) for seed in range(8)]
    manifests = [node.manifest(payload, number) for number, payload in enumerate(payloads, start=1)]
    update_id, size = manifests[0].digest, len(payloads[0])

    async def begin() -> Any:
        call = await node.begin(payloads[0], stop=0)
        while not central.rooms.uploads.path(node.node_id, update_id).exists():
            await asyncio.sleep(0.01)
        return call

    over_quota = await begin()
    for payload, manifest in zip(payloads[1:], manifests[1:], strict=True):
        assert (await refusal(node.upload(payload, manifest, stop=size - 1)))[1] == "WRONG_OFFSET"
    await write(over_quota, updates_pb2.UploadRequest(chunk=payloads[0]))
    await over_quota.done_writing()
    assert (await refusal(over_quota))[1] == "QUOTA_EXCEEDED"
    assert manifests[0].payload.digest_sha256 not in central.rooms.blobs
    assert (
        await node.query(update_id)
    ).committed_bytes == size  # it passes, so nothing has to be sent again

    for manifest in manifests:
        await asyncio.to_thread(central.rooms.uploads.discard, node.node_id, manifest.digest)
    of_a_revoked_node = await begin()
    await central.operators.RevokeNode(
        operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20
    )
    await write(of_a_revoked_node, updates_pb2.UploadRequest(chunk=payloads[0]))
    await of_a_revoked_node.done_writing()
    assert (await refusal(of_a_revoked_node))[1] == "REVOKED_NODE"
    assert manifests[0].payload.digest_sha256 not in central.rooms.blobs
    assert not central.rooms.uploads.path(node.node_id, update_id).exists()
    with central.rooms.journal.read() as state:
        assert state.updates == {}


async def test_bytes_that_are_forgotten_and_deleted_while_they_are_kept_stay_away(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload, rooms = encode_factors(), central.rooms
    first, digest = node.manifest(payload).digest, sha256_hex(payload)
    await node.upload(payload)
    put_file = rooms.blobs.put_file

    def slow(file: Path, digest: str) -> None:
        body = {"node_id": "", "updates": [first], "accept_loss": False, "by": "operator"}
        rooms.journal.append(NewEvent(EventKind.FORGET_ORDERED, "shared", "order", body))
        assert len(rooms.collector.collect("operator").blobs) == 1
        put_file(file, digest)

    monkeypatch.setattr(rooms.blobs, "put_file", slow)
    other = await central.enroll("b", await central.token())
    assert (await refusal(other.upload(payload)))[1] == "FORGOTTEN"
    assert digest not in rooms.blobs


async def test_an_update_that_is_being_recorded_counts_once_in_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = [encode_factors(seed) for seed in (1, 2)]
    reached, leave = threading.Event(), threading.Event()

    def reach(step: str) -> None:
        if step == "intake.recorded" and not reached.is_set():
            reached.set()
            leave.wait(10)

    limits = {"node_quota_bytes": 2 * len(payloads[0])}
    async with harness.running_central(harness.make_settings(tmp_path, limits=limits)) as central:
        node = await central.enroll("a", await central.token())
        second = await node.begin(payloads[1], 2)
        while not central.rooms.uploads.path(
            node.node_id, node.manifest(payloads[1], 2).digest
        ).exists():
            await asyncio.sleep(0.01)
        monkeypatch.setattr(faults, "reach", reach)
        first = asyncio.create_task(node.upload(payloads[0]))
        await asyncio.to_thread(reached.wait, 10)
        await second.done_writing()
        while sha256_hex(payloads[1]) not in central.rooms.blobs and not second.done():
            await asyncio.sleep(0.01)
        leave.set()
        assert (await first).body
        assert (await second).receipt.body


async def test_a_refused_upload_leaves_the_file_of_the_one_that_begins_afresh(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()
    update_id = node.manifest(payload).digest
    reached, leave, discard = threading.Event(), threading.Event(), Uploads.discard_own

    def slow(*arguments: Any) -> None:
        reached.set()
        leave.wait(10)
        discard(*arguments)

    altered = payload[:-1] + bytes([payload[-1] ^ 1])
    with monkeypatch.context() as patch:
        patch.setattr(Uploads, "discard_own", slow)
        refused = asyncio.create_task(refusal(node.upload(altered, node.manifest(payload))))
        await asyncio.to_thread(reached.wait, 10)
        afresh = await node.begin(payload, stop=400)
        leave.set()
        assert (await refused)[1] == "DIGEST_MISMATCH"
    while not central.rooms.uploads.path(node.node_id, update_id).exists():
        await asyncio.sleep(0.01)
    await afresh.write(updates_pb2.UploadRequest(chunk=payload[400:]))
    await afresh.done_writing()
    assert (await afresh).receipt.body
