"""What node and operator hear of a lost blob; its bytes may come again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from central.blobs import DirectoryBlobs
from central.cohort.errors import LostUpdate
from central.cohort.planning import set_aside
from central.journal import EventKind
from central.settings import CentralSettings
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready
from tests.contract.lost_blobs.damage import flip


async def test_a_node_sends_the_bytes_of_a_lost_payload_again(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path, limits={"node_updates_per_hour": 2})
    async with harness.running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        payload = harness.encode_factors()
        manifest = node.manifest(payload)
        receipt = await node.upload(payload)
        rooms = central.rooms
        path = rooms.blobs.path(manifest.payload.digest_sha256)  # type: ignore[attr-defined]
        flip(path, path)
        error = LostUpdate(manifest.digest, "its blob was altered")
        await asyncio.to_thread(set_aside, rooms.journal, "shared", error)
        asked = await node.query(manifest.digest)
        assert (asked.committed_bytes, asked.HasField("receipt")) == (0, False), (
            "its bytes may come again"
        )
        assert await node.upload(payload) == receipt, "it was admitted, and still is"
        assert rooms.blobs.read(manifest.payload.digest_sha256) == payload
        answer = await node.query(manifest.digest)
        assert (answer.receipt, answer.state) == (receipt, updates_pb2.UPDATE_STATE_WAITING)
        kinds = [event.kind for event in await asyncio.to_thread(rooms.journal.events)]
        assert (kinds.count(EventKind.UPDATE_ADMITTED), kinds.count(EventKind.UPDATE_REQUEUED)) == (
            1,
            1,
        )
        another = harness.encode_factors(1)
        assert await node.upload(another, node.manifest(another, 2)), "it counted only once"


async def test_what_stands_still_is_said_beside_releases_and_updates(tmp_path: Path) -> None:
    def failure(cohort: str) -> str:
        return "Blob x is not there. Restore it. (since then)" if cohort == "shared" else ""

    async with harness.running_central(harness.make_settings(tmp_path), failure=failure) as central:
        for cohort in ("shared", "zeta"):
            await central.token(cohort)
        operator = central.operators
        releases = await operator.ListReleases(operators_pb2.ListReleasesRequest(), timeout=20)
        updates = await operator.ListUpdates(
            operators_pb2.ListUpdatesRequest(cohort="shared"), timeout=20
        )
        other = await operator.ListUpdates(
            operators_pb2.ListUpdatesRequest(cohort="zeta"), timeout=20
        )
    expected = [operators_pb2.Standstill(cohort="shared", reason=failure("shared"))]
    assert (list(releases.standstills), list(updates.standstills), list(other.standstills)) == (
        expected,
        expected,
        [],
    )


async def test_the_commands_say_which_update_is_lost_and_why_a_cohort_stands_still(
    tmp_path: Path,
) -> None:
    """The real central.

    A waiting update's blob is damaged, the others are merged; then the head is lost beyond repair.
    """
    settings = harness.make_settings(tmp_path)
    blobs = DirectoryBlobs(settings.data_dir / "blobs")
    policy = {"MERGE__MIN_UPDATES": "3", "GATE__QUORUM": "0"}
    async with process(settings, "serve", **policy) as serving:
        await ready(serving)
        async with outside(settings) as central:
            token = await central.token()
            nodes = [await central.enroll(name, token) for name in ("a", "b", "c", "d")]
            payloads = [harness.encode_factors(seed) for seed in range(4)]
            for node, payload in zip(nodes[:2], payloads, strict=False):
                await node.upload(payload)
            lost = nodes[0].manifest(payloads[0])
            flip(blobs.path(lost.payload.digest_sha256), tmp_path)
            for node, payload in zip(nodes[2:], payloads[2:], strict=True):
                await node.upload(payload)
            rows = await said(settings, "updates", lambda out: out.count(" merged ") == 3)
            (line,) = (row for row in rows.splitlines() if row.startswith(lost.digest[:12]))
            assert " set_aside " in line
            assert "was altered: its digest is" in line
            assert "stands still" not in rows
            listed = await central.operators.ListReleases(
                operators_pb2.ListReleasesRequest(), timeout=20
            )
            (head,) = (release for release in listed.releases if "stable" in release.channels)
            with Path(blobs.path(nodes[1].manifest(payloads[1]).payload.digest_sha256)).open("wb"):
                pass
            manifest = harness.ReleaseManifest.from_bytes(
                await manifest_of(nodes[0], head.release_id)
            )
            blobs.path(manifest.payload.digest_sha256).unlink()
            start = harness.Start(
                release=manifest.digest,
                payload=manifest.payload.digest_sha256,
                prefix_rank=manifest.rank,
                dtype="float32",
            )
            for number, node in enumerate(nodes[1:]):
                payload = harness.encode_factors(10 + number)
                await node.upload(payload, node.manifest(payload, 2, start=start))
            for command in ("updates", "releases"):
                rows = await said(settings, command, lambda out: "stands still" in out)
                assert rows.startswith("Cohort shared stands still: Blob ")
                assert "Restore the blobs from a backup. (" in rows.splitlines()[0]


async def said(settings: CentralSettings, command: str, enough: Callable[[str], bool]) -> str:
    """What the command prints, as soon as it is enough."""
    for _ in range(30):
        async with process(settings, command) as asked:
            out, _ = await asyncio.wait_for(asked.communicate(), 60)
        if enough(out.decode()):
            break
        await asyncio.sleep(0.5)
    return out.decode()


async def manifest_of(node: harness.Node, release_id: str) -> bytes:
    request = releases_pb2.GetReleaseRequest(release_id=release_id)
    return bytes((await node.releases.GetRelease(request, timeout=20)).release.manifest)
