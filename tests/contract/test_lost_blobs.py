"""A blob that is damaged or gone: its update is set aside with the reason, the others are merged, and its bytes may come again."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from central.errors import Refused, StorageError
from central.federation.errors import LostUpdate
from central.federation.planning import PRODUCT_MEAN
from central.journal import EventKind
from central.operator.contributions import requeue
from central.operator.forgetting import order_forget
from central.registry import BlobLost, DirectoryBlobs
from central.settings import CentralSettings
from protos.operator.v1 import operator_pb2
from protos.releases.v1 import releases_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.cohort_loop import Central, answering, make_increment, make_settings, opened, result, take_steps
from tests.contract.test_central_process import outside, process, ready

NODES = ("a-1", "b-2", "c-3", "d-4", "e-5")


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def admit(central: Central, count: int = 3) -> list[str]:
    return [central.admit(node, make_increment(number)) for number, node in enumerate(NODES[:count])]


def record(central: Central, update_id: str) -> Any:
    with central.journal.read() as state:
        return state.updates[update_id]


def blob_of(central: Central, update_id: str) -> Path:
    return central.blobs.path(record(central, update_id).manifest.payload.digest_sha256)


def version(central: Central) -> int:
    return central.head().manifest.version


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "flipped": flip,
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
    "swapped": swap,
    "a directory": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "merge",
    [{}, {"filter": "near"}, {"filter": "clip"}, {"strategy": "FedAvg"}, {"strategy": "FedAdam"}, {"strategy": "Krum"}],
    ids=lambda merge: "-".join(merge.values()) or PRODUCT_MEAN,
)
def test_a_damaged_payload_is_set_aside_and_the_others_are_merged(
    central: Central, how: str, merge: dict[str, Any]
) -> None:
    ids = admit(central)
    DAMAGE[how](blob_of(central, ids[1]), blob_of(central, ids[0]))
    take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    bad = record(central, ids[1])
    assert [record(central, u).state for u in ids] == ["merged", "set_aside", "merged"]
    assert f"Update {ids[1][:8]} cannot be merged: Blob " in bad.reason
    assert "from a backup" in bad.reason
    assert bad.lost
    with central.journal.read() as state:
        assert state.kept_bytes(bad.manifest.node_id) == 0, "it takes nothing of its node's quota"


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_payload_that_the_disk_does_not_give_is_set_aside(
    central: Central, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = admit(central)
    failing(monkeypatch, blob_of(central, ids[2]), code)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged", "merged", "set_aside"]
    assert "cannot be read" in record(central, ids[2]).reason


def failing(monkeypatch: pytest.MonkeyPatch, blob: Path, code: int) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path == blob:
            raise OSError(code, "no")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ETIMEDOUT, errno.ESTALE])
def test_what_passes_sets_nobody_aside(central: Central, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = admit(central)
    with monkeypatch.context() as patch:
        failing(patch, blob_of(central, ids[2]), code)
        with pytest.raises(StorageError):
            take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged"] * 3


@pytest.mark.parametrize("merge", [{}, {"filter": "near"}, {"strategy": "FedAvg"}], ids=str)
def test_a_store_that_is_away_sets_nobody_aside(central: Central, tmp_path: Path, merge: dict[str, Any]) -> None:
    ids = admit(central)
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(BlobLost, match=r"Blob .* is not at"):
        take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    (tmp_path / "away").rename(tmp_path / "blobs")
    take_steps(central, make_settings(min_updates=2, **merge), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["merged"] * 3


def test_all_payloads_lost_one_after_the_other(central: Central) -> None:
    ids = admit(central)
    for update in ids[:2]:
        blob_of(central, update).unlink()
    take_steps(central, make_settings(min_updates=1), lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["set_aside", "set_aside", "merged"]


def test_a_lost_update_is_requeued_only_with_its_bytes(central: Central) -> None:
    ids = admit(central)
    path = blob_of(central, ids[1])
    data = path.read_bytes()
    flip(path, path)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    with pytest.raises(Refused, match=r"still gone or damaged.*Restore the blob"):
        requeue(central.journal, central.blobs, [ids[1]], "operator")
    assert central.blobs.put(data) == path.name, "bytes that come again replace what is damaged"
    requeue(central.journal, central.blobs, [ids[1]], "operator")
    assert (record(central, ids[1]).state, record(central, ids[1]).lost) == ("waiting", False)


def release_blob(central: Central) -> Path:
    return central.blobs.path(central.head().manifest.payload.digest_sha256)


@pytest.mark.parametrize("strategy", [PRODUCT_MEAN, "FedAdam"])
@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_a_lost_release_is_made_again_from_its_plan(central: Central, strategy: str, how: str) -> None:
    """Also what its strategy carries to the next merge."""
    settings = make_settings(min_updates=2, strategy=strategy)
    admit(central, 2)
    take_steps(central, settings, lambda: version(central) == 1)
    head = central.head()
    lost = [head.manifest.payload.digest_sha256, *([head.server_state] if head.server_state else [])]
    whole = [central.blobs.read(digest) for digest in lost]
    for digest in lost:
        DAMAGE[how](central.blobs.path(digest), central.blobs.path(digest))
    later = [central.admit(node, make_increment(9 + n), sequence=2) for n, node in enumerate(NODES[:2])]
    take_steps(central, settings, lambda: version(central) == 2)
    assert [central.blobs.read(digest) for digest in lost] == whole
    assert [record(central, u).state for u in later] == ["merged"] * 2


def test_a_release_that_cannot_be_made_again_blames_no_update(central: Central) -> None:
    ids = admit(central, 2)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    blob_of(central, ids[0]).unlink()
    release_blob(central).unlink()
    later = [central.admit(node, make_increment(9 + n), sequence=2) for n, node in enumerate(NODES[:2])]
    with pytest.raises(BlobLost, match="Restore the blobs from a backup"):
        take_steps(central, make_settings(min_updates=2), lambda: version(central) == 2)
    assert [record(central, u).state for u in later] == ["planned"] * 2


def test_a_candidate_that_is_lost_before_its_verdict_is_made_again(central: Central) -> None:
    admit(central, 2)
    candidates: list[str] = []

    def built() -> bool:
        with central.journal.read() as state:
            candidates[:] = [
                r.manifest.payload.digest_sha256 for r in state.releases.values() if r.state == "candidate"
            ]
        return bool(candidates)

    settings = make_settings(quorum=1, min_updates=2)
    take_steps(central, settings, built)
    central.blobs.path(candidates[0]).unlink()
    with answering(central.journal, lambda node: ([result("acme")], "")):
        take_steps(central, settings, lambda: version(central) == 1)
    assert central.blobs.holds(candidates[0])


def test_a_candidate_that_is_lost_with_one_of_its_updates_is_given_up(central: Central) -> None:
    ids = admit(central)
    settings = make_settings(quorum=1, min_updates=2)

    def built() -> bool:
        with central.journal.read() as state:
            return any(release.state == "candidate" for release in state.releases.values())

    take_steps(central, settings, built)
    with central.journal.read() as state:
        candidate = next(r for r in state.releases.values() if r.state == "candidate")
    central.blobs.path(candidate.manifest.payload.digest_sha256).unlink()
    blob_of(central, ids[0]).unlink()
    with answering(central.journal, lambda node: ([result("acme")], "")):
        take_steps(central, settings, lambda: version(central) == 1)
    assert [record(central, u).state for u in ids] == ["set_aside", "merged", "merged"]


async def test_a_node_sends_the_bytes_of_a_lost_payload_again(tmp_path: Path) -> None:
    async with harness.running_central(harness.make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        payload = harness.encode_factors()
        manifest = node.manifest(payload)
        receipt = await node.upload(payload)
        rooms = central.rooms
        path = rooms.blobs.path(manifest.payload.digest_sha256)  # type: ignore[attr-defined]
        flip(path, path)
        error = LostUpdate(manifest.digest, "its blob was altered")
        from central.federation.grid import set_aside

        await asyncio.to_thread(rooms.journal.append, set_aside("shared", error))
        asked = await node.query(manifest.digest)
        assert (asked.committed_bytes, asked.HasField("receipt")) == (0, False), "its bytes may come again"
        assert await node.upload(payload) == receipt, "it was admitted, and still is"
        assert rooms.blobs.read(manifest.payload.digest_sha256) == payload
        answer = await node.query(manifest.digest)
        assert (answer.receipt, answer.state) == (receipt, updates_pb2.UPDATE_STATE_WAITING)
        kinds = [event.kind for event in await asyncio.to_thread(rooms.journal.events)]
        assert (kinds.count(EventKind.UPDATE_ADMITTED), kinds.count(EventKind.UPDATE_REQUEUED)) == (1, 1)


async def test_what_stands_still_is_said_beside_releases_and_updates(tmp_path: Path) -> None:
    def failure(cohort: str) -> str:
        return "Blob x is not there. Restore it. (since then)" if cohort == "shared" else ""

    async with harness.running_central(harness.make_settings(tmp_path), failure=failure) as central:
        for cohort in ("shared", "zeta"):
            await central.token(cohort)
        operator = central.operator
        releases = await operator.ListReleases(operator_pb2.ListReleasesRequest(), timeout=20)
        updates = await operator.ListUpdates(operator_pb2.ListUpdatesRequest(cohort="shared"), timeout=20)
        other = await operator.ListUpdates(operator_pb2.ListUpdatesRequest(cohort="zeta"), timeout=20)
    expected = [operator_pb2.Standstill(cohort="shared", reason=failure("shared"))]
    assert (list(releases.standstills), list(updates.standstills), list(other.standstills)) == (expected, expected, [])


async def test_the_commands_say_which_update_is_lost_and_why_a_cohort_stands_still(tmp_path: Path) -> None:
    """The real central: a waiting update's blob is damaged, the others are merged; then the head is lost beyond repair."""
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
            listed = await central.operator.ListReleases(operator_pb2.ListReleasesRequest(), timeout=20)
            (head,) = (release for release in listed.releases if "stable" in release.channels)
            with Path(blobs.path(nodes[1].manifest(payloads[1]).payload.digest_sha256)).open("wb"):
                pass
            manifest = harness.ReleaseManifest.from_bytes(await manifest_of(nodes[0], head.release_id))
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


def test_a_lost_release_is_made_again_though_all_updates_of_the_plan_are_lost_too(central: Central) -> None:
    """The store's mark shows that it is there."""
    central.blobs.claim("this central")
    admit(central, 2)
    take_steps(central, make_settings(min_updates=2), lambda: version(central) == 1)
    later = central.admit("c-3", make_increment(9))
    head = release_blob(central)
    whole = head.read_bytes()
    blob_of(central, later).unlink()
    head.unlink()
    take_steps(central, make_settings(min_updates=1), lambda: record(central, later).state == "set_aside")
    assert head.read_bytes() == whole


@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_a_removal_is_made_though_the_release_that_it_takes_from_is_lost(central: Central, how: str) -> None:
    central.blobs.claim("this central")
    admit(central)
    take_steps(central, make_settings(min_updates=3), lambda: version(central) == 1)
    order_id = order_forget(central.journal, central.blobs, "b-2", False, "tests").order.order_id
    DAMAGE[how](release_blob(central), release_blob(central))

    def state() -> str:
        with central.journal.read() as found:
            return found.forgets[order_id].state

    take_steps(central, make_settings(), lambda: state() not in ("ordered", "planned"))
    assert state() == "done"


@pytest.mark.parametrize("of", ["shared", "acme"])
def test_a_composition_without_new_updates_makes_a_lost_release_again(tmp_path: Path, of: str) -> None:
    settings = make_settings(min_updates=1)
    with opened(tmp_path, {"acme": "shared"}) as central:
        central.blobs.claim("this central")
        for number, (cohort, node) in enumerate((("shared", "s-1"), ("acme", "a-1"))):
            central.join(cohort, node)
            central.admit(node, make_increment(number), cohort)
        take_steps(central, settings, lambda: central.head("acme").manifest.version == 1, "acme")
        take_steps(central, settings, lambda: central.head("shared").manifest.version == 1, "shared")
        lost = central.blobs.path(central.head(of).manifest.own_payload.digest_sha256)
        whole = lost.read_bytes()
        lost.unlink()
        take_steps(central, settings, lambda: central.head("acme").manifest.version == 2, "acme")
        assert lost.read_bytes() == whole
