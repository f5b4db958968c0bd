"""Releases, the watch and a node's status on real grpc.aio servers with mutual TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from central.blobs import DirectoryBlobs
from central.journal import EventKind, NewEvent
from protos.fleet.v1 import fleet_pb2
from protos.manifest import CHUNK_BYTES, sha256_hex, verify
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    Central,
    Node,
    accept,
    encode_factors,
    make_candidate,
    refusal,
)


async def download(
    node: Node, release_id: str, offset: int = 0, parts: list[bytes] | None = None
) -> bytes:
    """What came, also in `parts` when it ends with an error."""
    request = releases_pb2.DownloadRequest(release_id=release_id, offset=offset)
    parts = [] if parts is None else parts
    async for part in node.releases.Download(request, timeout=20):
        parts.append(part.chunk)
    return b"".join(parts)


async def test_download_from_any_offset_and_only_of_the_own_cohort(
    central: Central, node: Node
) -> None:
    release_id, payload = await make_candidate(central, node, encode_factors())
    assert await download(node, release_id) == payload
    assert await download(node, release_id, 100) == payload[100:]
    assert await download(node, release_id, len(payload)) == b""
    assert (await refusal(download(node, release_id, len(payload) + 1)))[1] == "WRONG_OFFSET"
    foreign = await central.enroll("d", await central.token("zeta"))
    assert (await refusal(download(foreign, release_id)))[1] == "UNKNOWN_RELEASE"
    answer = await node.releases.GetRelease(
        releases_pb2.GetReleaseRequest(release_id=release_id), timeout=20
    )
    verify(node.answer.release_key_pem, answer.release.manifest, answer.release.signature)
    head = await node.releases.GetHead(releases_pb2.GetHeadRequest(channel="stable"), timeout=20)
    assert head.head == node.answer.genesis


@pytest.mark.parametrize("damage", ["flipped", "swapped", "shorter", "longer", "gone"])
async def test_a_damaged_payload_is_never_given_whole(
    central: Central, node: Node, damage: str
) -> None:
    """Several chunks, as of a real model: the last is held back until the whole is verified."""
    release_id, payload = await make_candidate(central, node, encode_factors(), large=True)
    assert len(payload) > 2 * CHUNK_BYTES
    blobs = central.rooms.blobs
    assert isinstance(blobs, DirectoryBlobs)
    file = blobs.path(sha256_hex(payload))
    spoilt = {
        "flipped": payload[:100] + bytes([payload[100] ^ 1]) + payload[101:],
        "swapped": bytes(len(payload)),
        "shorter": payload[:-1],
        "longer": b"x" + payload,
    }
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(spoilt[damage])
    for offset in (0, 10, CHUNK_BYTES + 7, len(payload)):
        code, why, text = await refusal(download(node, release_id, offset, parts := []))
        assert (code, why) == (grpc.StatusCode.DATA_LOSS, "PAYLOAD_LOST")
        assert "central releases verify" in text
        assert sum(map(len, parts)) < max(1, len(payload) - offset)
    file.write_bytes(payload)
    assert await download(node, release_id, CHUNK_BYTES + 7) == payload[CHUNK_BYTES + 7 :]


async def test_a_watch_brings_what_is_there_and_every_change(central: Central, node: Node) -> None:
    journal = central.rooms.journal
    await asyncio.to_thread(
        journal.append, NewEvent(EventKind.TRAIN_OFFERED, "shared", "train-1", {"max_rank": 4})
    )
    watch = node.fleet.Watch(
        fleet_pb2.WatchRequest(status=fleet_pb2.NodeStatus(experiences=3)), timeout=20
    )
    first = [await watch.read() for _ in range(4)]
    assert [event.WhichOneof("event") for event in first] == ["head", "head", "standing", "train"]
    assert {event.head.channel for event in first[:2]} == {"stable", "canary"}
    assert (first[2].standing.quarantine, first[3].train.max_rank) == ("", 4)
    assert list(first[3].train.encodings) == ["float32", "bf16", "int8"]
    listed = (
        await central.operators.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    ).nodes[0]
    assert (listed.connected, listed.status.experiences) == (True, 3)

    release_id, _ = await make_candidate(central, node, encode_factors())
    body = {
        "candidate": release_id,
        "reference": node.genesis.digest,
        "tasks": 8,
        "deadline_at": "2999-01-01T00:00:00Z",
        "nodes": [node.node_id],
    }
    await asyncio.to_thread(
        journal.append, NewEvent(EventKind.EVALUATION_OFFERED, "shared", "offer-1", body)
    )
    offer = (await watch.read()).evaluation
    assert (offer.offer_id, offer.tasks, offer.reference) == ("offer-1", 8, node.answer.genesis)
    report = releases_pb2.ReportEvaluationRequest(
        offer_id="offer-1",
        results=[
            releases_pb2.EnvironmentResult(environment="e", tasks_digest="0" * 64, both_passed=8)
        ],
    )
    for _ in range(2):  # the second one changes nothing
        await node.releases.ReportEvaluation(report, timeout=20)
    with journal.read() as state:
        assert state.evaluations["offer-1"].reports[node.node_id].results[0]["both_passed"] == 8
    again = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    assert [(await again.read()).WhichOneof("event") for _ in range(4)] == [
        "head",
        "head",
        "standing",
        "train",
    ]

    await accept(central, release_id)
    heads = [await watch.read() for _ in range(2)]
    assert {sha256_hex(event.head.head.manifest) for event in heads} == {release_id}
    stranger = await central.enroll("d", await central.token("zeta"))
    assert (await refusal(stranger.releases.ReportEvaluation(report, timeout=20)))[
        1
    ] == "UNKNOWN_OFFER"


async def test_texts_of_callers_are_kept_short(central: Central, node: Node) -> None:
    long = "x" * 1_000_000
    problem = fleet_pb2.Problem(
        room=long[:999], text="\x1b[2J" + long, next_step=long[:999], since=long[:999]
    )
    environments = [long, *("e" for _ in range(1000))]
    status = fleet_pb2.NodeStatus(problems=[problem], environments=environments, experiences=3)
    reasons = {f"{number}\x1b[2J{long[:600]}": number for number in range(40)}
    status.unusable_experiences.update(reasons)
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=status), timeout=20)
    listed = (
        await central.operators.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    ).nodes[0]
    assert (len(listed.status.environments), listed.status.experiences) == (256, 3)
    assert {len(reason) for reason in listed.status.unusable_experiences} == {500}
    assert all(reason.isprintable() for reason in listed.status.unusable_experiences)
    assert len(listed.status.unusable_experiences) == 32
    kept = listed.status.problems[0]
    assert [len(text) for text in (kept.room, kept.text, kept.next_step, kept.since)] == [
        64,
        500,
        500,
        64,
    ]
    assert kept.text.startswith(" [2Jxxx")
    many = fleet_pb2.NodeStatus(
        problems=[fleet_pb2.Problem(room=str(number), text="x") for number in range(1000)]
    )
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=many), timeout=20)
    listed = (
        await central.operators.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    ).nodes[0]
    assert [problem.room for problem in listed.status.problems] == [
        str(number) for number in range(32)
    ]
    code, why, told = await refusal(
        node.releases.GetHead(releases_pb2.GetHeadRequest(channel=long), timeout=20)
    )
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT")
    assert len(told) == 2000


async def test_a_watch_beats(tmp_path: Path) -> None:
    async with harness.running_central(
        harness.make_settings(tmp_path), heartbeat_s=0.02
    ) as central:
        node = await central.enroll("a", await central.token())
        watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
        kinds = [(await watch.read()).WhichOneof("event") for _ in range(5)]
    assert kinds == ["head", "head", "standing", "heartbeat", "heartbeat"]
