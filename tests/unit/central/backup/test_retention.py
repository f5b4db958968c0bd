"""What retention may collect, and what it never may."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from central.blobs import DirectoryBlobs
from central.errors import StorageError
from central.intake.uploads import Uploads
from central.journal import EventKind, Journal, JournalConflict, NewEvent, State
from central.journal.payloads import needed_blobs, stored_blobs
from central.retention.collector import Collector
from central.retention.retention import collectable
from central.settings import RetentionSettings
from protos.manifest import Payload, ReleaseManifest, UpdateManifest
from tests.unit.central import builders as make

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
POLICY = RetentionSettings(superseded_days=7, set_aside_days=90, rejected_days=30)
AT_ONCE = RetentionSettings(superseded_days=0, set_aside_days=0, rejected_days=0)
YEARS = timedelta(days=3650)


class World:
    """A journal with its blobs, one cohort, and two nodes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(f"sqlite:///{path}/journal.db", clock=lambda: make.AT)
        self.blobs = DirectoryBlobs(path / "blobs")
        self.genesis = make.start_cohort(self.journal, nodes=("a-00000000", "b-00000000"))
        self.blobs.put(b"genesis")
        self._count = 0

    def update(
        self,
        node: str = "a-00000000",
        data: bytes | None = None,
        start: ReleaseManifest | None = None,
    ) -> UpdateManifest:
        self._count += 1
        data = data or b"update %d" % self._count
        payload = Payload(digest_sha256=self.blobs.put(data), size_bytes=len(data))
        update = make.make_update(start or self.genesis, node, self._count, payload=payload)
        self.journal.append(make.admitted(update))
        return update

    def candidate(self, parent: ReleaseManifest, *updates: UpdateManifest) -> ReleaseManifest:
        self._count += 1
        plan = make.make_plan(parent, *updates)
        data = b"release %d" % self._count
        payload = Payload(digest_sha256=self.blobs.put(data), size_bytes=len(data))
        candidate = make.make_candidate(plan).model_copy(update={"payload": payload})
        self.journal.append(make.planned(plan), make.built(candidate))
        return candidate

    def release(self, parent: ReleaseManifest, *updates: UpdateManifest) -> ReleaseManifest:
        candidate = self.candidate(parent, *updates)
        self.journal.append(make.decided(candidate, True), make.promoted(candidate))
        return candidate

    def supersede(self, old: UpdateManifest, new: UpdateManifest) -> None:
        self.journal.append(
            NewEvent(EventKind.UPDATE_SUPERSEDED, "shared", old.digest, {"by": new.digest})
        )

    def set_aside(self, update: UpdateManifest) -> None:
        self.journal.append(
            NewEvent(EventKind.UPDATE_SET_ASIDE, "shared", update.digest, {"reason": "a test"})
        )

    def collector(self, policy: RetentionSettings = AT_ONCE) -> Collector:
        uploads = Uploads(self.path / "uploads")
        return Collector(self.journal, self.blobs, uploads, policy, lambda: NOW + YEARS)

    def collectable(self, age: timedelta, policy: RetentionSettings = POLICY) -> dict[str, str]:
        with self.journal.read() as state:
            return {blob.digest: blob.reason for blob in collectable(state, NOW + age, policy)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.journal.close()


def payload(manifest: UpdateManifest | ReleaseManifest) -> str:
    return manifest.payload.digest_sha256


def test_each_kind_goes_after_its_own_time_and_says_why(world: World) -> None:
    old, new, aside, bad = (
        world.update(),
        world.update(),
        world.update("b-00000000"),
        world.update(),
    )
    world.supersede(old, new)
    world.set_aside(aside)
    rejected = world.candidate(world.genesis, bad)
    world.journal.append(make.decided(rejected, False, "fell in acme"))
    assert world.collectable(timedelta(days=6.9)) == {}
    assert list(world.collectable(timedelta(days=7))) == [payload(old)]
    assert list(world.collectable(timedelta(days=30))) == [payload(old), payload(rejected)]
    reasons = world.collectable(timedelta(days=90))
    assert reasons[payload(old)] == (
        f"update {old.digest[:12]} of node a-00000000 is superseded: superseded by the node's "
        f"update {new.digest}"
    )
    assert reasons[payload(aside)].endswith("of node b-00000000 is set aside: a test")
    assert (
        reasons[payload(rejected)] == f"{rejected.label} of cohort shared is rejected: fell in acme"
    )
    assert payload(bad) in reasons, "its candidate was rejected, so it was set aside with it"
    assert payload(new) not in reasons


def test_nothing_that_a_reachable_release_needs_goes(world: World) -> None:
    first = world.release(world.genesis, world.update(), world.update("b-00000000"))
    second = world.release(first, world.update(start=first))
    world.update(start=second)
    with world.journal.read() as state:
        assert needed_blobs(state) == stored_blobs(state).keys(), "all of it is needed"
    assert world.collectable(YEARS, AT_ONCE) == {}
    world.journal.append(make.rolled_back(first, second, updates="set_aside"))
    assert list(world.collectable(YEARS, AT_ONCE).values()) == [
        f"update {second.updates[0][:12]} of node a-00000000 is set aside: {second.label} was "
        "rolled back"
    ], "nodes may still send updates that start from a release that was served"


def test_an_update_that_a_rejected_plan_shares_with_a_release_stays(world: World) -> None:
    shared = world.update()
    rejected = world.candidate(world.genesis, shared)
    world.journal.append(make.decided(rejected, False))
    world.journal.append(NewEvent(EventKind.UPDATE_REQUEUED, "shared", shared.digest))
    world.release(world.genesis, shared, world.update("b-00000000"))
    assert list(world.collectable(YEARS, AT_ONCE)) == [payload(rejected)]


def test_the_same_bytes_of_another_update_keep_a_blob(world: World) -> None:
    old, new = world.update(data=b"same"), world.update(data=b"newer")
    world.supersede(old, new)
    twin = world.update("b-00000000", data=b"same")
    assert world.collectable(YEARS, AT_ONCE) == {}
    world.set_aside(twin)
    assert world.collectable(timedelta(days=80)) == {}, "the twin is not old enough"
    assert list(world.collectable(timedelta(days=90))) == [payload(old)]


def test_an_open_plan_keeps_what_it_merges_and_builds_on(world: World) -> None:
    update = world.update()
    plan = make.make_plan(world.genesis, update)
    world.journal.append(make.planned(plan))
    assert world.collectable(YEARS, AT_ONCE) == {}


# Collecting.


def test_a_collection_is_recorded_done_and_explained(world: World, tmp_path: Path) -> None:
    old, new = world.update(), world.update()
    world.supersede(old, new)
    preview = world.collector().preview()
    assert [blob.digest for blob in preview.blobs] == [payload(old)]
    assert payload(old) in world.blobs
    done = world.collector().collect("an operator")
    assert (done, done.size_bytes) == (preview, old.payload.size_bytes)
    assert payload(old) not in world.blobs
    assert payload(new) in world.blobs
    events = [event for event in world.journal.events() if event.kind is EventKind.BLOBS_COLLECTED]
    assert [(event.body["by"], event.body["blobs"][0]["digest"]) for event in events] == [
        ("an operator", payload(old))
    ]
    before = world.journal.verify()
    assert world.collector().collect("again").blobs == ()
    assert world.journal.verify() == before
    world.journal.close()
    again = Journal(f"sqlite:///{tmp_path}/journal.db")
    with again.read() as state:
        assert list(state.collected) == [payload(old)]
        assert state.collections == {}
        assert payload(old) not in stored_blobs(state)
    again.close()


def test_an_update_whose_payload_is_gone_is_not_requeued(world: World) -> None:
    update = world.update()
    world.set_aside(update)
    world.collector().collect("tests")
    requeue = NewEvent(EventKind.UPDATE_REQUEUED, "shared", update.digest)
    with pytest.raises(
        JournalConflict, match=r"its payload was collected on 2026-11-22 \(update .* set aside"
    ):
        world.journal.append(requeue)


def marked(world: World) -> dict[str, object]:
    with world.journal.read() as state:
        return dict(state.collected)


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_blob_that_is_named_again_stays(world: World, is_deleted: bool) -> None:
    """Another node's update with the same bytes is admitted around a recorded collection.

    It comes before the collection is done, or after.
    """
    old, new = world.update(data=b"same"), world.update()
    world.supersede(old, new)
    collector = world.collector()
    with world.journal.read():
        collector._record("tests", lambda state: collectable(state, NOW + YEARS, AT_ONCE))
    assert list(marked(world)) == [payload(old)]
    if is_deleted:
        collector.recover()
        assert payload(old) not in world.blobs
    twin = world.update("b-00000000", data=b"same")
    assert marked(world) == {}
    collector.recover()
    assert world.blobs.read(payload(twin)) == b"same"
    with world.journal.read() as state:
        assert state.collections == {}


def test_a_quota_counts_until_a_payload_is_collected_and_again_when_it_is_named_again(
    world: World,
) -> None:
    def kept(node: str) -> int:
        with world.journal.read() as state:
            return state.kept_bytes(node)

    old, new = world.update(data=b"same"), world.update(data=b"newer")
    assert kept(old.node_id) == len(b"same") + len(b"newer")
    world.supersede(old, new)
    assert kept(old.node_id) == len(b"same") + len(b"newer"), "it is on disk"
    world.collector().collect("tests")
    assert kept(old.node_id) == len(b"newer")
    twin = world.update("b-00000000", data=b"same")
    assert (kept(old.node_id), kept(twin.node_id)) == (
        len(b"same") + len(b"newer"),
        len(b"same"),
    ), "the bytes are back"


def test_room_is_made_of_what_never_merges_before_its_days_are_over(world: World) -> None:
    old, new, aside = world.update(), world.update(), world.update()
    world.supersede(old, new)
    world.set_aside(aside)
    collector = world.collector(POLICY)
    assert not collector.make_room("b-00000000"), "it has none"
    assert collector.make_room(old.node_id)
    assert list(marked(world)) == [payload(old)]
    assert not collector.make_room(None)


def test_a_store_that_refuses_leaves_the_rest_to_the_next_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = [world.update() for _ in range(3)]
    for update in updates:
        world.set_aside(update)

    def refuse(digest: str) -> None:
        raise StorageError("no")

    with monkeypatch.context() as patch:
        patch.setattr(world.blobs, "delete", refuse)
        with pytest.raises(StorageError):
            world.collector().collect("tests")
    assert all(payload(update) in world.blobs for update in updates)
    assert world.collector().collect("tests").blobs == (), "they are recorded already"
    assert not any(payload(update) in world.blobs for update in updates)


def test_many_blobs_go_in_several_events(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("central.retention.collector.BLOBS_PER_EVENT", 2)
    for update in [world.update() for _ in range(5)]:
        world.set_aside(update)
    assert len(world.collector().collect("tests").blobs) == 5
    kinds = [event.kind for event in world.journal.events()]
    assert (kinds.count(EventKind.BLOBS_COLLECTED), kinds.count(EventKind.COLLECTION_FINISHED)) == (
        3,
        3,
    )


def test_a_collection_that_is_none_is_refused() -> None:
    state = State()
    from central.journal.events import chain

    for kind, body in (
        (EventKind.BLOBS_COLLECTED, {"blobs": []}),
        (EventKind.COLLECTION_FINISHED, {}),
    ):
        with pytest.raises(JournalConflict):
            state.apply(chain(NewEvent(kind, subject="x", body=body), 1, make.AT, "0" * 64))


class Stop:
    """An event that is set after so many waits."""

    def __init__(self, rounds: int) -> None:
        self.waited: list[float] = []
        self._rounds = rounds

    def wait(self, timeout_s: float) -> bool:
        self.waited.append(timeout_s)
        return len(self.waited) > self._rounds


def test_retention_by_itself_collects_in_turns_and_outlives_a_failing_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = world.collector(RetentionSettings(set_aside_days=0, every_hours=2))
    world.set_aside(world.update())
    stop, calls = Stop(3), list[str]()

    def collect(by: str) -> None:
        calls.append(by)
        if len(calls) == 1:
            raise StorageError("the disk is away")
        Collector.collect(collector, by)

    monkeypatch.setattr(collector, "collect", collect)
    collector.run(stop)  # type: ignore[arg-type]
    assert (stop.waited, calls) == ([7200.0] * 4, ["retention"] * 3)
    assert len(marked(world)) == 1
    never = Stop(0)
    world.collector().run(never)  # type: ignore[arg-type]
    assert never.waited == [], "without a time it never runs"
