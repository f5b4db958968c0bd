"""Central's services on real grpc.aio servers with mutual TLS: what may be uploaded, and what a revoked node may still do."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from central import faults
from central.errors import ListenError, Reason, Refused, StorageError
from central.fleet.presence import Presence
from central.intake.admission import Admission
from central.intake.validation import PayloadCheck
from central.journal import EventKind
from central.main import Services
from protos.fleet.v1 import fleet_pb2
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import ReceiptBody, sha256_hex, sign, verify
from protos.operator.v1 import operator_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    DOWN_PROJ,
    Q_PROJ,
    Central,
    Node,
    encode_factors,
    reason,
    refusal,
)
from tests.unit.central import builders as make


async def test_a_cut_upload_goes_on_and_a_repeat_gets_the_same_receipt(central: Central, node: Node) -> None:
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
    assert (event.kind, event.subject, event.hash) == (EventKind.UPDATE_ADMITTED, manifest.digest, body.journal_hash)
    assert await node.upload(payload) == receipt
    known = await node.query(manifest.digest)
    assert (known.receipt, known.state) == (receipt, updates_pb2.UPDATE_STATE_WAITING)
    assert central.rooms.blobs.read(manifest.payload.digest_sha256) == payload
    with central.rooms.journal.read() as state:
        assert [update.update_id for update in state.waiting("shared")] == [manifest.digest]


async def test_two_uploads_of_one_update_admit_it_once(central: Central, node: Node) -> None:
    payload = encode_factors()
    results = await asyncio.gather(*(node.upload(payload) for _ in range(4)), return_exceptions=True)
    receipts = {result.body for result in results if isinstance(result, updates_pb2.Receipt)}
    assert len(receipts) == 1
    reasons = {reason(result) for result in results if isinstance(result, grpc.aio.AioRpcError)}
    assert reasons <= {"TAKEN_OVER", "WRONG_OFFSET"}, results
    kinds = [event.kind for event in central.rooms.journal.events()]
    assert kinds.count(EventKind.UPDATE_ADMITTED) == 1


async def test_bytes_cannot_change_between_their_check_and_their_keeping(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()
    update_id = node.manifest(payload).digest
    threads: list[threading.Thread] = []

    finish = PayloadCheck.finish

    def check(*arguments: Any) -> None:
        finish(*arguments)
        # Another stream of the same update, just now.
        threads.append(threading.Thread(target=central.rooms.partial.discard, args=(node.node_id, update_id)))
        threads[0].start()
        threads[0].join(0.2)

    monkeypatch.setattr(PayloadCheck, "finish", check)
    assert await node.upload(payload)
    threads[0].join(10)
    assert central.rooms.blobs.read(sha256_hex(payload)) == payload


async def test_a_journal_that_fails_costs_no_byte_twice(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()

    def fail(*_: object) -> None:
        raise StorageError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(central.rooms.journal, "append", fail)
        assert (await refusal(node.upload(payload)))[:2] == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED")
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == len(payload)
    assert await node.upload(payload, offset=len(payload))
    assert not list(central.settings.data_dir.rglob("*.part"))


@pytest.mark.parametrize(
    ("status", "kept"), [(grpc.StatusCode.FAILED_PRECONDITION, False), (grpc.StatusCode.RESOURCE_EXHAUSTED, True)]
)
async def test_what_is_refused_at_the_last_step_stays_only_for_who_may_try_again(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch, status: grpc.StatusCode, kept: bool
) -> None:
    payload = encode_factors()

    def refuse(*_: object) -> None:
        raise Refused(status, Reason.UNKNOWN_START, "Its start was collected while it came.")

    monkeypatch.setattr(Admission, "_check_kept", refuse)
    assert (await refusal(node.upload(payload)))[:2] == (status, "UNKNOWN_START")
    expected = len(payload) if kept else 0
    assert central.rooms.partial.held_bytes(node.node_id, "", ()) == expected
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == expected


async def test_a_node_sees_only_its_own_updates(central: Central, node: Node) -> None:
    other = await central.enroll("b", await central.token())
    payload = encode_factors()
    await node.upload(payload)
    answer = await other.query(node.manifest(payload).digest)
    assert (answer.committed_bytes, answer.HasField("receipt")) == (0, False)
    _, why, _ = await refusal(other.upload(payload, node.manifest(payload)))
    assert why == "BAD_MANIFEST"


def bad_payload(change: str) -> bytes:
    modules = dict(harness.make_factors().modules)
    q = modules[Q_PROJ]
    if change == "NOT_FINITE":
        a = q.A.copy()
        a[0, 0] = np.nan
        modules[Q_PROJ] = replace(q, A=a)
    if change == "NORM_OUT_OF_BOUNDS":
        modules[Q_PROJ] = replace(q, scale=1e9)
    if change == "UNKNOWN_MODULE":
        modules["model.embed_tokens"] = q
    if change == "BAD_SHAPE":
        modules[DOWN_PROJ] = LoraModule(q.A, modules[DOWN_PROJ].B)
    if change == "RANK_TOO_LARGE":
        modules = dict(harness.make_factors(rank=3).modules)
    payload = encode(LoraTensors(modules))
    if change == "BAD_DTYPE":
        payload = payload.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1)
    if change == "MALFORMED_PAYLOAD":
        payload = b"PK\x03\x04" + payload
    if change == "UNKNOWN_SECTION":
        payload = encode(LoraTensors(modules, {"statistics": {"x": np.zeros(2, np.float32)}}))
    return payload


@pytest.mark.parametrize(
    "expected",
    [
        "NOT_FINITE",
        "NORM_OUT_OF_BOUNDS",
        "UNKNOWN_MODULE",
        "BAD_SHAPE",
        "RANK_TOO_LARGE",
        "BAD_DTYPE",
        "MALFORMED_PAYLOAD",
        "UNKNOWN_SECTION",
    ],
)
async def test_a_bad_payload_is_refused_and_leaves_nothing(central: Central, node: Node, expected: str) -> None:
    payload = bad_payload(expected)
    code, why, text = await refusal(node.upload(payload))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, expected), text
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == 0
    with central.rooms.journal.read() as state:
        assert state.updates == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base": "0" * 64}, "OTHER_BASE"),
        ({"start": {"release": "0" * 64, "payload": "0" * 64, "prefix_rank": 0, "dtype": "float32"}}, "UNKNOWN_START"),
        ({"rank": 5}, "RANK_TOO_LARGE"),
        ({"payload": {"digest_sha256": "0" * 64, "size_bytes": 1 << 40}}, "TOO_LARGE"),
        ({"payload": {"digest_sha256": "0" * 64, "size_bytes": 7000}}, "QUOTA_EXCEEDED"),
        ({"node_id": "b-00000000"}, "BAD_MANIFEST"),
        ({"sections": ["statistics"]}, "UNKNOWN_SECTION"),
        ({"metrics": {f"loss-{i}": 0.5 for i in range(10_000)}}, "TOO_LARGE"),
    ],
)
async def test_a_bad_manifest_is_refused(central: Central, node: Node, fields: dict[str, Any], expected: str) -> None:
    payload = encode_factors()
    _, why, text = await refusal(node.upload(payload, node.manifest(payload, **fields)))
    assert why == expected, text


async def test_altered_bytes_are_refused(node: Node) -> None:
    payload = encode_factors()
    manifest = node.manifest(payload)
    altered = payload[:-1] + bytes([payload[-1] ^ 1])
    code, why, _ = await refusal(node.upload(altered, manifest))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH")
    _, why, _ = await refusal(node.upload(payload, manifest, signature=sign(node.key, b"other")))
    assert why == "BAD_SIGNATURE"
    _, why, _ = await refusal(node.upload(payload, manifest, stop=600))
    _, why, _ = await refusal(node.upload(altered, manifest, offset=600))
    assert why == "WRONG_OFFSET"  # not final: the earlier bytes may have been at fault
    assert (await node.query(manifest.digest)).committed_bytes == 0
    await node.upload(payload, manifest)


async def test_a_start_of_another_cohort_is_refused(central: Central, node: Node) -> None:
    foreign = await central.enroll("d", await central.token("zeta"))
    payload = encode_factors()
    start = foreign.manifest(payload).start
    code, why, told = await refusal(node.upload(payload, node.manifest(payload, start=start)))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "UNKNOWN_START")
    absent = start.model_copy(update={"release": "0" * 64})
    _, _, same = await refusal(node.upload(payload, node.manifest(payload, start=absent)))
    # A release of another cohort is answered like one that does not exist.
    assert told.split("starts from")[1].replace(start.release, "") == same.split("starts from")[1].replace("0" * 64, "")


async def test_what_changes_while_a_payload_comes_is_seen_before_it_is_kept(central: Central, node: Node) -> None:
    payloads = [encode_factors(seed) for seed in range(8)]
    manifests = [node.manifest(payload, number) for number, payload in enumerate(payloads, start=1)]
    update_id, size = manifests[0].digest, len(payloads[0])

    async def begin() -> Any:
        call = await node.begin(payloads[0])
        while not central.rooms.partial.path(node.node_id, update_id).exists():
            await asyncio.sleep(0.01)
        return call

    over_quota = await begin()
    for payload, manifest in zip(payloads[1:], manifests[1:], strict=True):
        assert (await refusal(node.upload(payload, manifest, stop=size - 1)))[1] == "WRONG_OFFSET"
    await over_quota.done_writing()
    assert (await refusal(over_quota))[1] == "QUOTA_EXCEEDED"
    assert manifests[0].payload.digest_sha256 not in central.rooms.blobs
    assert (await node.query(update_id)).committed_bytes == size  # it passes, so nothing has to be sent again

    for manifest in manifests:
        await asyncio.to_thread(central.rooms.partial.discard, node.node_id, manifest.digest)
    of_a_revoked_node = await begin()
    await central.operator.RevokeNode(operator_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20)
    await of_a_revoked_node.done_writing()
    assert (await refusal(of_a_revoked_node))[1] == "REVOKED_NODE"
    assert manifests[0].payload.digest_sha256 not in central.rooms.blobs
    assert not central.rooms.partial.path(node.node_id, update_id).exists()
    with central.rooms.journal.read() as state:
        assert state.updates == {}


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
        while not central.rooms.partial.path(node.node_id, node.manifest(payloads[1], 2).digest).exists():
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


async def test_a_refused_stream_leaves_the_file_of_the_one_that_begins_afresh(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = encode_factors()
    update_id = node.manifest(payload).digest
    reached, leave, fail = threading.Event(), threading.Event(), Admission._fail

    def slow(*arguments: Any) -> None:
        reached.set()
        leave.wait(10)
        fail(*arguments)

    monkeypatch.setattr(Admission, "_fail", slow)
    altered = asyncio.create_task(refusal(node.upload(payload[:-1] + bytes([payload[-1] ^ 1]), node.manifest(payload))))
    await asyncio.to_thread(reached.wait, 10)
    afresh = await node.begin(payload, stop=400)
    while not central.rooms.partial.path(node.node_id, update_id).exists():
        await asyncio.sleep(0.01)
    leave.set()
    assert (await altered)[1] == "DIGEST_MISMATCH"
    await afresh.write(updates_pb2.UploadRequest(chunk=payload[400:]))
    await afresh.done_writing()
    assert (await afresh).receipt.body


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


async def test_a_revoked_node_is_refused_and_its_watch_ends(central: Central, node: Node) -> None:
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    await watch.read()
    await central.operator.RevokeNode(operator_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20)

    async def read_to_end() -> None:
        while await watch.read() is not grpc.aio.EOF:
            pass

    assert (await refusal(read_to_end()))[1] == "REVOKED_NODE"
    assert (await refusal(node.query("0" * 64)))[1] == "REVOKED_NODE"
    listed = (await central.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20)).nodes[0]
    assert (listed.revoked, listed.connected) == (True, False)


async def test_a_revoked_nodes_updates_are_not_merged_any_more(central: Central, node: Node) -> None:
    other = await central.enroll("b", await central.token())
    payloads = [encode_factors(seed) for seed in range(3)]
    for sender, payload in ((node, payloads[0]), (other, payloads[1])):
        await sender.upload(payload)
    plan = make.make_plan(node.genesis, node.manifest(payloads[0]), other.manifest(payloads[1]))
    await asyncio.to_thread(central.rooms.journal.append, make.planned(plan))
    merged = encode(LoraTensors({Q_PROJ: harness.make_factors(9).modules[Q_PROJ]}))
    candidate = await asyncio.to_thread(central.rooms.registry.add_candidate, plan.digest, merged, 0.25)
    for _ in range(2):  # the second time nothing more happens
        await central.operator.RevokeNode(operator_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20)
    with central.rooms.journal.read() as state:
        assert [update.manifest.node_id for update in state.waiting("shared")] == [other.node_id]
        aside = state.updates[node.manifest(payloads[0]).digest]
        assert (aside.state, aside.reason) == ("set_aside", "its node was revoked")
        assert (state.releases[candidate.digest].state, state.open_plans("shared")) == ("rejected", [])
    events = central.rooms.journal.events()[-3:]
    assert [event.kind for event in events] == [
        EventKind.UPDATE_SET_ASIDE, EventKind.TOKEN_REVOKED, EventKind.NODE_REVOKED
    ]  # fmt: skip
    assert events[2].body == {"by": "operator"}


async def test_a_taken_port_is_named(central: Central) -> None:
    with pytest.raises(ListenError, match=str(central.settings.listen.port)):
        async with Services(central.rooms, central.settings, Presence()):
            pass
