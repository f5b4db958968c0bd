"""Canary and cohorts that build on shared: what nodes say, operators see, and who may read."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import pytest

from central.errors import SettingsError
from central.journal import EventKind, NewEvent
from central.rooms import open_rooms
from protos.fleet.v1 import fleet_pb2
from protos.lora import encode
from protos.manifest import ReleaseManifest
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import Central, Node, make_candidate, refusal
from tests.unit.central import builders as make

BUILDS_ON = {"builds_on": {"acme": "shared", "beta": "shared"}}


async def test_a_canary_is_reported_shown_and_rolled_back(tmp_path: Path) -> None:
    channels = {"first": "canary", "soak_s": 3600}
    async with harness.running_central(
        harness.make_settings(tmp_path, channels=channels)
    ) as central:
        token = await central.token()
        nodes = [await central.enroll(name, token) for name in ("a", "b")]
        release_id, _ = await make_candidate(central, nodes[0], harness.encode_factors())
        await accept(central, release_id, "canary")
        assert [await head(nodes[0], channel) for channel in ("stable", "canary")] == [
            nodes[0].genesis.digest,
            release_id,
        ]
        (soak,) = await soaks(central)
        assert (list(soak.serving), soak.promotes_at) == ([], "")
        assert "EDGE_RELEASES__CHANNEL=canary" in soak.waits_for
        for _ in range(2):  # the second time says nothing new
            await report(nodes[0], channel="canary", serving_release_id=release_id)
            await report(
                nodes[1], channel="stable", serving_release_id=release_id, release_problem="x"
            )
        (soak,) = await soaks(central)
        assert (list(soak.serving), soak.promotes_at > soak.since) == ([nodes[0].node_id], True)
        await report(nodes[1], channel="canary", release_problem="refused " + 1000 * "x")
        (soak,) = await soaks(central)
        assert [len(problem) for problem in soak.troubled.values()] == [500]
        assert soak.promotes_at == ""
        explained = await central.operators.ExplainRelease(
            operators_pb2.ExplainReleaseRequest(release=release_id), timeout=20
        )
        assert [told.condition for told in explained.canary_reports] == ["serving", "trouble"]
        back = operators_pb2.RollbackReleaseRequest(
            cohort="shared", channel="canary", updates=operators_pb2.ABANDONED_UPDATES_REQUEUE
        )
        done = await central.operators.RollbackRelease(back, timeout=20)
        assert (done.release.release_id, list(done.abandoned_release_ids)) == (
            nodes[0].genesis.digest,
            [release_id],
        )
        assert (await refusal(central.operators.RollbackRelease(back, timeout=20)))[
            1
        ] == "BAD_ARGUMENT"
        assert await head(nodes[0], "canary") == nodes[0].genesis.digest
        await report(nodes[0], channel="canary", serving_release_id=release_id)  # it was on its way
        assert await soaks(central) == []


async def test_every_cohort_reads_its_own_releases_only(tmp_path: Path) -> None:
    async with harness.running_central(
        harness.make_settings(tmp_path, cohorts=BUILDS_ON)
    ) as central:
        names = {"s": "shared", "a": "acme", "b": "beta"}
        nodes = {
            cohort: await central.enroll(name, await central.token(cohort))
            for name, cohort in names.items()
        }
        shared, _ = await make_candidate(central, nodes["shared"], harness.encode_factors(1))
        await accept(central, shared, "stable", "shared")
        composed = {
            cohort: await compose(central, nodes[cohort], shared) for cohort in ("acme", "beta")
        }
        visible = {"shared": {shared}, "acme": {composed["acme"]}, "beta": {composed["beta"]}}
        for cohort, node in nodes.items():
            for release_id in {shared, *composed.values()}:
                if release_id in visible[cohort]:
                    await fetch(node, release_id)
                else:
                    assert (await refusal(fetch(node, release_id)))[1] == "UNKNOWN_RELEASE"
        manifest = ReleaseManifest.from_bytes(
            (await fetch(nodes["acme"], composed["acme"])).release.manifest
        )
        assert manifest.composition is not None
        assert manifest.composition.builds_on == shared
        told = await central.operators.ExplainRelease(
            operators_pb2.ExplainReleaseRequest(release=composed["acme"]), timeout=20
        )
        assert told.builds_on_version.startswith("v1-")
        assert dict(told.updates_in_lineage) == {nodes["shared"].node_id: 1}
        diff = operators_pb2.DiffReleasesRequest(
            release_a=nodes["acme"].genesis.digest, release_b=composed["acme"]
        )
        assert len((await central.operators.DiffReleases(diff, timeout=20)).added) == 1


async def test_what_a_cohort_builds_on_cannot_be_changed_later(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path, cohorts=BUILDS_ON)
    async with harness.running_central(settings) as central:
        await central.token("acme")
        await central.token("plain")
    for builds_on, message in (
        ({"acme": "none"}, "'acme' builds on none; it was made to build on shared"),
        ({"plain": "shared"}, "'plain' builds on shared; it was made to build on none"),
    ):
        changed = settings.model_copy(
            update={"cohorts": settings.cohorts.model_copy(update={"builds_on": builds_on})}
        )
        with pytest.raises(SettingsError, match=message), ExitStack() as stack:
            await asyncio.to_thread(open_rooms, changed, stack)
    forgotten = settings.model_copy(update={"cohorts": type(settings.cohorts)()})
    with ExitStack() as stack:  # the journal knows
        rooms = await asyncio.to_thread(open_rooms, forgotten, stack)
        with rooms.journal.read() as state:
            assert state.builds_on == {"acme": "shared"}


async def accept(central: Central, release_id: str, channel: str, cohort: str = "shared") -> None:
    body = {"accepted": True, "text": "fine", "environments": {}, "high_water": {}}
    await asyncio.to_thread(
        central.rooms.journal.append,
        NewEvent(EventKind.VERDICT, cohort, release_id, body),
        NewEvent(EventKind.PROMOTED, cohort, release_id, {"channel": channel, "by": "gate"}),
    )


async def compose(central: Central, node: Node, base: str) -> str:
    """Id of a candidate of the node's cohort that is composed with `base`."""
    plan = make.make_plan(node.genesis).model_copy(update={"builds_on": base})
    await asyncio.to_thread(central.rooms.journal.append, make.planned(plan))
    payload, own = encode(harness.make_factors(5)), encode(harness.make_factors(6))
    candidate = await asyncio.to_thread(
        central.rooms.registry.add_candidate, plan.digest, payload, 0.1, None, own, 0.0
    )
    return candidate.digest


async def head(node: Node, channel: str) -> str:
    answer = await node.releases.GetHead(releases_pb2.GetHeadRequest(channel=channel), timeout=20)
    return ReleaseManifest.from_bytes(answer.head.manifest).digest


async def fetch(node: Node, release_id: str) -> releases_pb2.GetReleaseResponse:
    request = releases_pb2.DownloadRequest(release_id=release_id)
    async for _ in node.releases.Download(request, timeout=20):
        pass
    return await node.releases.GetRelease(
        releases_pb2.GetReleaseRequest(release_id=release_id), timeout=20
    )


async def report(node: Node, **fields: str) -> None:
    status = fleet_pb2.NodeStatus(**fields)  # type: ignore[arg-type]
    await node.fleet.ReportStatus(fleet_pb2.ReportStatusRequest(status=status), timeout=20)


async def soaks(central: Central) -> list[operators_pb2.Soak]:
    listed = await central.operators.ListReleases(operators_pb2.ListReleasesRequest(), timeout=20)
    return [release.soak for release in listed.releases if release.HasField("soak")]
