"""Releases, the watch and the operator on real grpc.aio servers with mutual TLS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from central.errors import StorageError
from central.journal import EventKind, NewEvent
from central.registry import DirectoryBlobs
from protos.fleet.v1 import fleet_pb2
from protos.manifest import CHUNK_BYTES, sha256_hex, verify
from protos.operator.v1 import operator_pb2, operator_pb2_grpc
from protos.releases.v1 import releases_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_candidate,
    refusal,
)

# Releases and the watch.


async def accept(central: Central, release_id: str) -> None:
    body = {"accepted": True, "text": "fine", "environments": {}, "high_water": {}}
    await asyncio.to_thread(
        central.rooms.journal.append,
        NewEvent(EventKind.VERDICT, "shared", release_id, body),
        NewEvent(EventKind.PROMOTED, "shared", release_id, {"channel": "stable", "by": "gate"}),
    )


async def download(node: Node, release_id: str, offset: int = 0, parts: list[bytes] | None = None) -> bytes:
    """What came, also in `parts` when it ends with an error."""
    request = releases_pb2.DownloadRequest(release_id=release_id, offset=offset)
    parts = [] if parts is None else parts
    async for part in node.releases.Download(request, timeout=20):
        parts.append(part.chunk)
    return b"".join(parts)


async def test_download_from_any_offset_and_only_of_the_own_cohort(central: Central, node: Node) -> None:
    release_id, payload = await make_candidate(central, node, encode_factors())
    assert await download(node, release_id) == payload
    assert await download(node, release_id, 100) == payload[100:]
    assert await download(node, release_id, len(payload)) == b""
    assert (await refusal(download(node, release_id, len(payload) + 1)))[1] == "WRONG_OFFSET"
    foreign = await central.enroll("d", await central.token("zeta"))
    assert (await refusal(download(foreign, release_id)))[1] == "UNKNOWN_RELEASE"
    answer = await node.releases.GetRelease(releases_pb2.GetReleaseRequest(release_id=release_id), timeout=20)
    verify(node.answer.release_key_pem, answer.release.manifest, answer.release.signature)
    head = await node.releases.GetHead(releases_pb2.GetHeadRequest(channel="stable"), timeout=20)
    assert head.head == node.answer.genesis


@pytest.mark.parametrize("damage", ["flipped", "swapped", "shorter", "longer", "gone"])
async def test_a_damaged_payload_is_never_given_whole(central: Central, node: Node, damage: str) -> None:
    """Several chunks, as those of a real model: the last one is held back until all of it is known to be what was released."""
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
    await asyncio.to_thread(journal.append, NewEvent(EventKind.TRAIN_OFFERED, "shared", "train-1", {"max_rank": 4}))
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(status=fleet_pb2.NodeStatus(experiences=3)), timeout=20)
    first = [await watch.read() for _ in range(4)]
    assert [event.WhichOneof("event") for event in first] == ["head", "head", "standing", "train"]
    assert {event.head.channel for event in first[:2]} == {"stable", "canary"}
    assert (first[2].standing.quarantine, first[3].train.max_rank) == ("", 4)
    listed = (await central.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20)).nodes[0]
    assert (listed.connected, listed.status.experiences) == (True, 3)

    release_id, _ = await make_candidate(central, node, encode_factors())
    body = {
        "candidate": release_id,
        "reference": node.genesis.digest,
        "tasks": 8,
        "deadline_at": "2999-01-01T00:00:00Z",
        "nodes": [node.node_id],
    }
    await asyncio.to_thread(journal.append, NewEvent(EventKind.EVALUATION_OFFERED, "shared", "offer-1", body))
    offer = (await watch.read()).evaluation
    assert (offer.offer_id, offer.tasks, offer.reference) == ("offer-1", 8, node.answer.genesis)
    report = releases_pb2.ReportEvaluationRequest(
        offer_id="offer-1",
        results=[releases_pb2.EnvironmentResult(environment="e", tasks_digest="0" * 64, both_passed=8)],
    )
    for _ in range(2):  # the second one changes nothing
        await node.releases.ReportEvaluation(report, timeout=20)
    with journal.read() as state:
        assert state.evaluations["offer-1"].reports[node.node_id].results[0]["both_passed"] == 8
    again = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    assert [(await again.read()).WhichOneof("event") for _ in range(4)] == ["head", "head", "standing", "train"]

    await accept(central, release_id)
    heads = [await watch.read() for _ in range(2)]
    assert {sha256_hex(event.head.head.manifest) for event in heads} == {release_id}
    stranger = await central.enroll("d", await central.token("zeta"))
    assert (await refusal(stranger.releases.ReportEvaluation(report, timeout=20)))[1] == "UNKNOWN_OFFER"


async def test_only_a_silent_nodes_result_is_taken_after_the_verdict(central: Central, node: Node) -> None:
    journal = central.rooms.journal
    release_id, _ = await make_candidate(central, node, encode_factors())
    asked = {"candidate": release_id, "reference": node.genesis.digest, "tasks": 8, "nodes": [node.node_id]}
    for offer_id in ("one", "two"):
        body = {**asked, "deadline_at": "2999-01-01T00:00:00Z"}
        await asyncio.to_thread(journal.append, NewEvent(EventKind.EVALUATION_OFFERED, "shared", offer_id, body))
    await accept(central, release_id)
    results = [releases_pb2.EnvironmentResult(environment="e", tasks_digest="0" * 64, both_passed=8)]

    async def report(offer_id: str, **answer: Any) -> None:
        request = releases_pb2.ReportEvaluationRequest(offer_id=offer_id, **answer)
        await node.releases.ReportEvaluation(request, timeout=20)

    async def silent_since() -> str:
        listed = await central.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20)
        return str(listed.nodes[0].silent_since)

    before = await asyncio.to_thread(journal.verify)
    await report("one", results=results)
    silent = NewEvent(EventKind.NODE_SILENT, "shared", node.node_id, {"offer_id": "one"})
    await asyncio.to_thread(journal.append, silent)
    assert await silent_since()
    await report("one", abstain_reason="TimeoutError")
    assert await asyncio.to_thread(journal.verify) == before + 1
    await report("one", results=results)
    assert await silent_since() == ""
    await report("two", results=results)
    assert await asyncio.to_thread(journal.verify) == before + 2
    shown = await central.operator.GetRelease(operator_pb2.GetReleaseRequest(release=release_id), timeout=20)
    (late,) = shown.release.evaluations
    assert (late.abstain_reason, late.results[0].both_passed) == ("it came after the verdict", 8)


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([{"both_passed": 9}], "counts 9 tasks of environment 'e'. Expected at most 8"),
        ([{"both_passed": 2**32 - 1, "neither_passed": 2**32 - 1}], "Expected at most 8"),
        ([{}], "without any task"),
        ([{"both_passed": 8}, {"both_passed": 8, "tasks_digest": "1" * 64}], "twice"),
        ([{"both_passed": 8, "environment": ""}], "not at all"),
        ([{"both_passed": 8, "environment": "x" * 129}], "128 characters"),
        ([{"both_passed": 8, "tasks_digest": "t"}], "64 hex digits"),
        ([{"both_passed": 8, "environment": f"e{i}"} for i in range(257)], "at most 256"),
        ([], "either results or a reason"),
    ],
)
async def test_a_report_that_no_evaluation_can_make_is_refused(
    central: Central, node: Node, results: list[dict[str, Any]], text: str
) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    body = {
        "candidate": release_id,
        "reference": node.genesis.digest,
        "tasks": 8,
        "deadline_at": "2999-01-01T00:00:00Z",
        "nodes": [node.node_id],
    }
    offered = NewEvent(EventKind.EVALUATION_OFFERED, "shared", "offer-1", body)
    await asyncio.to_thread(central.rooms.journal.append, offered)
    fields = {"environment": "e", "tasks_digest": "0" * 64}
    report = releases_pb2.ReportEvaluationRequest(
        offer_id="offer-1", results=[releases_pb2.EnvironmentResult(**{**fields, **result}) for result in results]
    )
    _, why, told = await refusal(node.releases.ReportEvaluation(report, timeout=20))
    assert (why, text in told) == ("BAD_ARGUMENT", True), told
    with central.rooms.journal.read() as state:
        assert not state.evaluations["offer-1"].reports


async def test_a_later_look_names_its_environments_tasks_and_references(central: Central, node: Node) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    genesis = node.genesis.digest
    body = {
        "candidate": release_id,
        "reference": release_id,  # any two releases of the cohort will do
        "tasks": 40,
        "deadline_at": "2999-01-01T00:00:00Z",
        "nodes": [node.node_id],
        "look": 2,
        "references": {"e": genesis},
        "suites": {"e": {"first_task": 20, "tasks": 40}, "f": {"first_task": 10, "tasks": 5}},
        "attempts": 3,
        "temperature": 0.5,
    }
    offered = NewEvent(EventKind.EVALUATION_OFFERED, "shared", "offer-2", body)
    await asyncio.to_thread(central.rooms.journal.append, offered)
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    async for event in watch:
        if event.WhichOneof("event") == "evaluation":
            break
    offer = event.evaluation
    assert [sha256_hex(signed.manifest) for signed in offer.references] == [genesis]
    assert offer.only_suites
    assert (offer.attempts, offer.temperature) == (3, 0.5)
    assert [(s.environment, s.reference_id, s.first_task, s.tasks) for s in offer.suites] == [
        ("e", genesis, 20, 40),
        ("f", "", 10, 5),
    ]


async def test_texts_of_callers_are_kept_short(central: Central, node: Node) -> None:
    long = "x" * 1_000_000
    problem = fleet_pb2.Problem(room=long[:999], text="\x1b[2J" + long, next_step=long[:999], since=long[:999])
    environments = [long, *("e" for _ in range(1000))]
    status = fleet_pb2.NodeStatus(problems=[problem], environments=environments, experiences=3)
    reasons = {f"{number}\x1b[2J{long[:600]}": number for number in range(40)}
    status.unusable_experiences.update(reasons)
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=status), timeout=20)
    listed = (await central.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20)).nodes[0]
    assert (len(listed.status.environments), listed.status.experiences) == (256, 3)
    assert {len(reason) for reason in listed.status.unusable_experiences} == {500}
    assert all(reason.isprintable() for reason in listed.status.unusable_experiences)
    assert len(listed.status.unusable_experiences) == 32
    kept = listed.status.problems[0]
    assert [len(text) for text in (kept.room, kept.text, kept.next_step, kept.since)] == [64, 500, 500, 64]
    assert kept.text.startswith(" [2Jxxx")
    many = fleet_pb2.NodeStatus(problems=[fleet_pb2.Problem(room=str(number), text="x") for number in range(1000)])
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=many), timeout=20)
    listed = (await central.operator.ListNodes(operator_pb2.ListNodesRequest(), timeout=20)).nodes[0]
    assert [problem.room for problem in listed.status.problems] == [str(number) for number in range(32)]
    code, why, told = await refusal(node.releases.GetHead(releases_pb2.GetHeadRequest(channel=long), timeout=20))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_ARGUMENT")
    assert len(told) == 2000


async def test_a_watch_beats(tmp_path: Path) -> None:
    async with harness.running_central(harness.make_settings(tmp_path), heartbeat_s=0.02) as central:
        node = await central.enroll("a", await central.token())
        watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
        kinds = [(await watch.read()).WhichOneof("event") for _ in range(5)]
    assert kinds == ["head", "head", "standing", "heartbeat", "heartbeat"]


# The operator.


async def test_the_operator_sees_promotes_and_rolls_back(central: Central, node: Node) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    operator = central.operator
    promote = operator_pb2.PromoteReleaseRequest(release=release_id[:8], channel="canary")
    assert (await refusal(operator.PromoteRelease(promote, timeout=20)))[1] == "NOT_ACCEPTED"
    await accept(central, release_id)
    shown = (await operator.PromoteRelease(promote, timeout=20)).release
    assert (list(shown.channels), shown.verdict, shown.truncation_error) == (["canary", "stable"], "fine", 0.25)
    update_id = node.manifest(encode_factors()).digest
    assert dict(shown.update_weights) == {update_id: 1.0}
    back = operator_pb2.PromoteReleaseRequest(release=node.genesis.digest, channel="stable")
    assert (await refusal(operator.PromoteRelease(back, timeout=20)))[1] == "BAD_ARGUMENT"

    rollback = operator_pb2.RollbackReleaseRequest(cohort="shared", updates=operator_pb2.ABANDONED_UPDATES_REQUEUE)
    done = await operator.RollbackRelease(rollback, timeout=20)
    assert (done.release.release_id, list(done.abandoned_release_ids)) == (node.genesis.digest, [release_id])
    updates = (await operator.ListUpdates(operator_pb2.ListUpdatesRequest(cohort="shared"), timeout=20)).updates
    assert [(update.update_id, update.state) for update in updates] == [(update_id, updates_pb2.UPDATE_STATE_WAITING)]
    assert (await refusal(operator.RollbackRelease(rollback, timeout=20)))[1] == "BAD_ARGUMENT"
    unspecified = operator_pb2.RollbackReleaseRequest(cohort="shared")
    assert (await refusal(operator.RollbackRelease(unspecified, timeout=20)))[1] == "BAD_ARGUMENT"

    listed = (await operator.ListReleases(operator_pb2.ListReleasesRequest(), timeout=20)).releases
    assert [release.state for release in listed] == [
        operator_pb2.RELEASE_STATE_ACCEPTED,
        operator_pb2.RELEASE_STATE_ABANDONED,
    ]
    events = (await operator.ListEvents(operator_pb2.ListEventsRequest(after=2, limit=2), timeout=20)).events
    assert [event.sequence for event in events] == [3, 4]
    unknown = operator_pb2.GetReleaseRequest(release="v9-00000000")
    assert (await refusal(operator.GetRelease(unknown, timeout=20)))[1] == "UNKNOWN_RELEASE"
    for cohort, uses in (("No Name", 1), ("new\n", 1), ("new", 0)):
        bad = operator_pb2.CreateTokenRequest(cohort=cohort, uses=uses, valid_s=60)
        assert (await refusal(operator.CreateToken(bad, timeout=20)))[1] == "BAD_ARGUMENT"
    with central.rooms.journal.read() as state:
        assert state.cohorts() == ["shared"]
    typo = operator_pb2.ListUpdatesRequest(cohort="shred")
    assert (await refusal(operator.ListUpdates(typo, timeout=20)))[1:] == (
        "UNKNOWN_COHORT",
        "Cohort 'shred' is not known. Expected one of: shared.",
    )
    unknown_node = operator_pb2.ListUpdatesRequest(node_id="nobody")
    assert (await refusal(operator.ListUpdates(unknown_node, timeout=20)))[1] == "UNKNOWN_NODE"
    assert (await refusal(operator.ListReleases(operator_pb2.ListReleasesRequest(cohort="x"), timeout=20)))[
        1
    ] == "UNKNOWN_COHORT"
    beyond = operator_pb2.ListEventsRequest(after=2**64 - 1)
    assert not (await operator.ListEvents(beyond, timeout=20)).events


async def test_the_operator_asks_where_a_release_comes_from_and_what_it_changed(central: Central, node: Node) -> None:
    release_id, _ = await make_candidate(central, node, encode_factors())
    await accept(central, release_id)
    status = fleet_pb2.NodeStatus(serving_release_id=release_id)
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=status), timeout=20)
    explain = operator_pb2.ExplainReleaseRequest(release=release_id[:8])
    told = await central.operator.ExplainRelease(explain, timeout=20)
    assert [(part.node_id, part.weight) for part in told.contributions] == [(node.node_id, 1.0)]
    assert [(period.channel, period.by, period.until) for period in told.periods] == [("stable", "gate", "")]
    assert [serving.node_id for serving in told.serving] == [node.node_id]
    diff = operator_pb2.DiffReleasesRequest(release_a=node.genesis.label, release_b=release_id)
    change = await central.operator.DiffReleases(diff, timeout=20)
    assert [update.update_id for update in change.added] == list(told.release.update_weights)
    factors = harness.make_factors(9).modules[harness.Q_PROJ]
    assert [module.module for module in change.modules] == [harness.Q_PROJ]
    assert change.all_modules.norm_b == pytest.approx(factors.scale * np.linalg.norm(factors.B @ factors.A), rel=1e-5)
    unknown = operator_pb2.DiffReleasesRequest(release_a="v9-00000000", release_b=release_id)
    assert (await refusal(central.operator.DiffReleases(unknown, timeout=20)))[1] == "UNKNOWN_RELEASE"
    assert (await refusal(operator_stub(node).ExplainRelease(explain, timeout=20)))[1] == "NOT_OPERATOR"


def operator_stub(node: Node) -> operator_pb2_grpc.OperatorServiceStub:
    """The operator's service, asked with a node's certificate."""
    return operator_pb2_grpc.OperatorServiceStub(node.channel)


async def test_a_failing_disk_is_said_to_be_one(central: Central, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("/secret/path is full")

    monkeypatch.setattr(central.rooms.journal, "events", fail)
    request = operator_pb2.ListEventsRequest()
    code, why, told = await refusal(central.operator.ListEvents(request, timeout=20))
    assert (code, why) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_FAILED")
    assert "secret" not in told
