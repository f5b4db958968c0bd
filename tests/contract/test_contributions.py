"""Operators on single contributions: requeue, set aside, quarantine, forget, explain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import central.cli.forget as forget_command
from central.cli import main
from central.journal import EventKind, NewEvent
from protos.fleet.v1 import fleet_pb2
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import Central, Node, encode_factors, make_candidate, refusal
from tests.contract.cohort_loop import take_steps
from tests.unit.central import builders as make


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with harness.running_central(harness.make_settings(tmp_path)) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    return await central.enroll("a", await central.token())


async def updates(central: Central) -> list[operators_pb2.Update]:
    return list(
        (
            await central.operators.ListUpdates(operators_pb2.ListUpdatesRequest(), timeout=20)
        ).updates
    )


async def states(central: Central) -> list[str]:
    names = operators_pb2.Update.DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number
    return [
        names[update.state].name.removeprefix("UPDATE_STATE_") for update in await updates(central)
    ]


def set_aside(*ids: str, reason: str = "looks odd") -> operators_pb2.SetAsideUpdatesRequest:
    return operators_pb2.SetAsideUpdatesRequest(updates=ids, reason=reason)


def requeue(*ids: str) -> operators_pb2.RequeueUpdatesRequest:
    return operators_pb2.RequeueUpdatesRequest(updates=ids)


async def test_an_update_is_set_aside_and_waits_again(central: Central, node: Node) -> None:
    operator, manifest = central.operators, node.manifest(encode_factors())
    await node.upload(encode_factors(), manifest)
    answer = await operator.SetAsideUpdates(set_aside(manifest.digest[:6]), timeout=20)
    assert (answer.updates[0].reason, await states(central)) == (
        "operator: looks odd",
        ["SET_ASIDE"],
    )
    answer = await operator.RequeueUpdates(requeue(manifest.digest[:12]), timeout=20)
    assert (answer.updates[0].reason, await states(central)) == ("", ["WAITING"])
    events = await asyncio.to_thread(central.rooms.journal.events)
    assert [(e.kind.value, e.body["by"]) for e in events[-2:]] == [
        ("update_set_aside", "operator"),
        ("update_requeued", "operator"),
    ]


async def test_a_bad_order_says_what_is_wrong_and_changes_nothing(
    central: Central, node: Node
) -> None:
    operator, journal = central.operators, central.rooms.journal
    first, second = node.manifest(encode_factors()), node.manifest(encode_factors(1), 2)
    await node.upload(encode_factors(), first)
    await node.upload(encode_factors(1), second)  # supersedes the first
    for request, problem in (
        (requeue(), "0 updates are named"),
        (requeue(second.digest, second.digest), "2 updates are named, 1 of them different"),
        (requeue("abc"), "'abc' is not known. Expected an id, or 6 or more of its first digits"),
        (
            requeue(second.digest),
            "is waiting; only one that is set aside can wait again. It waits already",
        ),
        (requeue(first.digest), "is superseded; .* The node's newer update took its place"),
    ):
        assert_matches(problem, await refusal(operator.RequeueUpdates(request, timeout=20)))
    for order, problem in (
        (set_aside(second.digest, reason=" "), "The reason has 0 characters"),
        (
            set_aside(second.digest, reason="x" * 501),
            "The reason has 501 characters. Expected 1 to 500",
        ),
        (set_aside(second.digest, first.digest), "is superseded; only one that waits"),
    ):
        assert_matches(problem, await refusal(operator.SetAsideUpdates(order, timeout=20)))
    before = await asyncio.to_thread(journal.verify)
    assert await states(central) == ["SUPERSEDED", "WAITING"]

    await operator.SetAsideUpdates(set_aside(second.digest), timeout=20)
    third = node.manifest(encode_factors(2), 3)
    await node.upload(encode_factors(2), third)
    told = await refusal(operator.RequeueUpdates(requeue(second.digest), timeout=20))
    assert_matches(
        f"same start as update {third.digest[:12]} .* which is waiting: "
        "the same experience would count twice",
        told,
    )
    await operator.SetAsideUpdates(set_aside(third.digest), timeout=20)
    told = await refusal(operator.RequeueUpdates(requeue(second.digest, third.digest), timeout=20))
    assert_matches("would count twice", told)
    await asyncio.to_thread(central.rooms.blobs.delete, second.payload.digest_sha256)
    told = await refusal(operator.RequeueUpdates(requeue(second.digest), timeout=20))
    assert_matches("payload of update .* is no longer kept", told)
    assert await asyncio.to_thread(journal.verify) == before + 3
    await operator.RevokeNode(operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20)
    assert_matches(
        "which is revoked",
        await refusal(operator.RequeueUpdates(requeue(third.digest), timeout=20)),
    )


async def test_a_node_in_quarantine_sends_and_hears_and_is_not_merged(
    central: Central, node: Node
) -> None:
    operator = central.operators
    await node.upload(encode_factors(), node.manifest(encode_factors()))
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    assert [await standing(watch)] == [""]
    request = operators_pb2.QuarantineNodeRequest(
        node_id=node.node_id, reason="its labels are wrong"
    )
    assert len((await operator.QuarantineNode(request, timeout=20)).updates) == 1
    assert (
        len((await operator.QuarantineNode(request, timeout=20)).updates) == 1
    )  # a repeat changes nothing
    assert await standing(watch) == "its labels are wrong"
    listed = (await operator.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)).nodes[0]
    assert listed.quarantine == "its labels are wrong"

    newer = node.manifest(encode_factors(1), 2)
    await node.upload(encode_factors(1), newer)
    assert (await node.query(newer.digest)).HasField("receipt"), "nothing acknowledged is lost"
    assert await states(central) == ["SUPERSEDED", "QUARANTINED"], (
        "one update per start counts, kept aside or not"
    )
    assert_matches(
        "is quarantined; .* `central nodes release`",
        await refusal(operator.RequeueUpdates(requeue(newer.digest), timeout=20)),
    )
    with central.rooms.journal.read() as state:
        assert state.waiting("shared") == []
    answer = await operator.ReleaseNode(
        operators_pb2.ReleaseNodeRequest(node_id=node.node_id), timeout=20
    )
    assert [update.update_id for update in answer.updates] == [newer.digest]
    assert await states(central) == ["SUPERSEDED", "WAITING"]
    assert await standing(watch) == ""
    told = await refusal(
        operator.ReleaseNode(operators_pb2.ReleaseNodeRequest(node_id=node.node_id), timeout=20)
    )
    assert_matches("is not in quarantine", told)
    unknown = operators_pb2.QuarantineNodeRequest(node_id="nobody", reason="x")
    assert (await refusal(operator.QuarantineNode(unknown, timeout=20)))[1] == "UNKNOWN_NODE"


async def test_an_operator_forgets_on_the_command_line(
    central: Central,
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = node.manifest(encode_factors())
    release_id, _ = await make_candidate(central, node, encode_factors())
    journal = central.rooms.journal
    verdict = NewEvent(
        EventKind.VERDICT,
        "shared",
        release_id,
        {"accepted": True, "text": "ok", "environments": {}, "high_water": {}},
    )
    with journal.read() as state:
        accepted = state.releases[release_id].manifest
    await asyncio.to_thread(journal.append, verdict, make.promoted(accepted))
    run = commands(central, monkeypatch, capsys)
    code, told, problem = await run("forget", manifest.digest[:8])
    assert (code, "repeat with --yes" in problem, await states(central)) == (1, True, ["MERGED"])
    assert "in the stable release; with a new release without it" in told
    assert "how: exact: the 1 merge since v0-" in told
    assert f"can no longer be promoted or returned to afterwards: {accepted.label}" in told
    assert (await run("forget", manifest.digest, "--dry-run"))[0] == 0
    assert (await run("forget"))[0] == 1
    assert (await run("forget", "nobody", "--yes"))[0] == 1
    code, told, _ = await run("forget", node.node_id, "--yes", "--no-wait", "--json")
    order = json.loads(told)
    assert (code, order["state"], order["in_release"][0]["state"]) == (0, "ordered", "merged")
    code, told, _ = await run("forget", "--orders")
    assert (code, "ordered" in told, node.node_id in told, "waits_for" in told) == (
        0,
        True,
        True,
        False,
    )
    code, told, _ = await run("forget", order["order_id"][:8], "--cancel")
    assert (code, told) == (
        0,
        f"order {order['order_id'][:8]} is taken back by operator: "
        "what was merged is still there (1)\n",
    )
    assert (await run("forget", node.node_id, "--cancel"))[0] == 1
    assert "taken back by operator" in (await run("forget", "--orders"))[1]
    code, told, _ = await run("updates", "--state", "merged", "--json")
    assert [row["update_id"] for row in json.loads(told)] == [manifest.digest]
    assert (await run("updates", "set-aside", manifest.digest[:8], "--reason", "x"))[0] == 1
    code, told, _ = await run("nodes", "quarantine", node.node_id, "--reason", "wrong labels")
    assert "0 of its updates are kept aside, and those to come" in told
    assert "wrong labels" in (await run("nodes"))[1]
    assert "0 of its updates wait" in (await run("nodes", "release", node.node_id))[1]
    assert "evaluates" not in (await run("nodes"))[1]
    body = {
        "candidate": release_id,
        "reference": release_id,
        "tasks": 8,
        "deadline_at": make.AT,
        "nodes": [node.node_id],
    }
    silent = NewEvent(EventKind.NODE_SILENT, "shared", node.node_id, {"offer_id": "o"})
    await asyncio.to_thread(
        journal.append, NewEvent(EventKind.EVALUATION_OFFERED, "shared", "o", body), silent
    )
    assert ", not waited for" in (await run("nodes"))[1]


async def test_the_bytes_of_a_forgotten_update_are_not_taken_again(
    central: Central, node: Node
) -> None:
    payload = encode_factors()
    twin = await central.enroll("b", await central.token())  # the same site, enrolled again
    release_id, _ = await make_candidate(central, node, payload)
    journal = central.rooms.journal
    with journal.read() as state:
        accepted = state.releases[release_id].manifest
    await asyncio.to_thread(journal.append, make.decided(accepted, True), make.promoted(accepted))
    first = twin.manifest(payload)
    await twin.upload(payload, first)
    await central.operators.SetAsideUpdates(set_aside(first.digest), timeout=20)

    request = operators_pb2.ForgetRequest(target=node.node_id)
    order = (await central.operators.Forget(request, timeout=20)).order
    assert order.state == operators_pb2.FORGET_STATE_ORDERED  # the stable head holds it still
    for uploader, manifest in (
        (twin, twin.manifest(payload, 2)),
        (node, node.manifest(payload, 2)),
    ):
        status, code, text = await refusal(uploader.upload(payload, manifest))
        assert (status, code) == (grpc.StatusCode.FAILED_PRECONDITION, "FORGOTTEN")
        assert "ordered to be forgotten" in text
    await central.operators.RollbackRelease(
        operators_pb2.RollbackReleaseRequest(
            cohort="shared", updates=operators_pb2.ABANDONED_UPDATES_REQUEUE
        ),
        timeout=20,
    )
    assert await states(central) == ["FORGOTTEN", "SET_ASIDE"]
    assert (await refusal(node.upload(payload, node.manifest(payload, 3))))[1] == "FORGOTTEN"
    assert_matches(
        "the same bytes as one that is forgotten",
        await refusal(central.operators.RequeueUpdates(requeue(first.digest), timeout=20)),
    )
    assert (await node.query(node.manifest(payload, 3).digest)).committed_bytes == 0
    await node.upload(encode_factors(5), node.manifest(encode_factors(5), 4))


async def test_the_command_waits_for_the_new_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(forget_command, "POLL_S", 0.05)
    settings = harness.make_settings(tmp_path, gate={"quorum": 0}, merge={"min_updates": 1})
    failures = {"shared": "the disk was full (at noon)"}
    async with harness.running_central(
        settings, failure=lambda cohort: failures.get(cohort, "")
    ) as central:
        node = await central.enroll("a", await central.token())
        await node.upload(encode_factors(), node.manifest(encode_factors()))
        journal = central.rooms.journal

        def until(version: int) -> None:
            def reached() -> bool:
                with journal.read() as state:
                    head = state.head("shared")
                    return head is not None and head.manifest.version == version

            take_steps(central.rooms, settings, reached)  # type: ignore[arg-type]

        await asyncio.to_thread(until, 1)
        run = commands(central, monkeypatch, capsys)
        command = asyncio.create_task(run("forget", node.node_id, "--yes"))
        while journal.events()[-1].kind != EventKind.FORGET_ORDERED:
            await asyncio.sleep(0.02)
        listed = await central.operators.ListForgets(operators_pb2.ListForgetsRequest(), timeout=20)
        assert listed.orders[0].waits_for.endswith("the disk was full (at noon)")
        failures.clear()
        await asyncio.to_thread(until, 2)
        code, told, _ = await command
        with journal.read() as state:
            (held,) = [
                release_id for release_id, r in state.releases.items() if r.state == "withdrawn"
            ]
        told_node = await refusal(
            anext(aiter(node.releases.Download(releases_pb2.DownloadRequest(release_id=held))))
        )
        assert (told_node[1], "holds a contribution that was forgotten" in told_node[2]) == (
            "NOT_ACCEPTED",
            True,
        )
    assert (code, "is done: v2-" in told.splitlines()[-1], "are to be forgotten" in told) == (
        0,
        True,
        True,
    )


async def test_where_a_release_served_outlives_central(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    async with harness.running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        genesis = node.genesis.digest
        for served in (genesis, genesis, "no release", ""):
            await report(node, served)
    async with harness.running_central(settings) as central:
        request = operators_pb2.ExplainReleaseRequest(release=genesis)
        answer = await central.operators.ExplainRelease(request, timeout=20)
        assert [(p.node_id, bool(p.since), p.until) for p in answer.served] == [
            (node.node_id, True, "")
        ]
        assert not answer.serving, "it has not called since"
        events = await asyncio.to_thread(central.rooms.journal.events)
        assert [event.kind for event in events].count(EventKind.RELEASE_SERVED) == 1


async def report(node: Node, release_id: str) -> None:
    status = fleet_pb2.NodeStatus(serving_release_id=release_id)
    call = harness.fleet_pb2_grpc.FleetServiceStub(node.channel).ReportStatus
    await call(fleet_pb2.ReportStatusRequest(status=status), timeout=20)


async def standing(watch: Any) -> str:
    while (event := await watch.read()).WhichOneof("event") != "standing":
        pass
    return str(event.standing.quarantine)


def commands(
    central: Central, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    monkeypatch.setenv("CENTRAL_DATA_DIR", str(central.settings.data_dir))
    monkeypatch.setenv("CENTRAL_LISTEN__PORT", str(central.settings.listen.port))

    def run(arguments: tuple[str, ...]) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        return (caught.value.code, *capsys.readouterr())

    return lambda *arguments: asyncio.to_thread(run, arguments)


def assert_matches(pattern: str, told: tuple[object, str | None, str]) -> None:
    assert told[1] == "BAD_ARGUMENT"
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(told[2])
