"""What central asks nodes to evaluate, and which of their reports it takes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from central.journal import EventKind, NewEvent
from protos.fleet.v1 import fleet_pb2
from protos.manifest import sha256_hex
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract.central_harness import (
    Central,
    Node,
    accept,
    encode_factors,
    make_candidate,
    refusal,
)


async def test_only_a_silent_nodes_result_is_taken_after_the_verdict(
    central: Central, node: Node
) -> None:
    journal = central.rooms.journal
    release_id, _ = await make_candidate(central, node, encode_factors())
    asked = {
        "candidate": release_id,
        "reference": node.genesis.digest,
        "tasks": 8,
        "nodes": [node.node_id],
    }
    for offer_id in ("one", "two"):
        body = {**asked, "deadline_at": "2999-01-01T00:00:00Z"}
        await asyncio.to_thread(
            journal.append, NewEvent(EventKind.EVALUATION_OFFERED, "shared", offer_id, body)
        )
    await accept(central, release_id)
    results = [
        releases_pb2.EnvironmentResult(environment="e", tasks_digest="0" * 64, both_passed=8)
    ]

    async def report(offer_id: str, **answer: Any) -> None:
        request = releases_pb2.ReportEvaluationRequest(offer_id=offer_id, **answer)
        await node.releases.ReportEvaluation(request, timeout=20)

    async def silent_since() -> str:
        listed = await central.operators.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
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
    shown = await central.operators.GetRelease(
        operators_pb2.GetReleaseRequest(release=release_id), timeout=20
    )
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
        offer_id="offer-1",
        results=[releases_pb2.EnvironmentResult(**{**fields, **result}) for result in results],
    )
    _, why, told = await refusal(node.releases.ReportEvaluation(report, timeout=20))
    assert (why, text in told) == ("BAD_ARGUMENT", True), told
    with central.rooms.journal.read() as state:
        assert not state.evaluations["offer-1"].reports


async def test_a_later_look_names_its_environments_tasks_and_references(
    central: Central, node: Node
) -> None:
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
