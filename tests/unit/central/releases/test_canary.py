"""Channels from canary to stable: promotion, rollback, reports of nodes on the channel."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from central.blobs import DirectoryBlobs
from central.cohort.planning import plan_merge
from central.cohort.soaking import SoakWatch
from central.errors import Refused
from central.journal import Journal, JournalConflict, ReleaseRecord
from central.releases import Registry
from central.releases.canary import MAX_TROUBLES, Soak, find_soak, record_report
from central.settings import ChannelPolicy, MergePolicy
from protos.lora import LoraTensors, encode
from tests.unit.central import builders as make
from tests.unit.central.releases.test_registry import KEY

POLICY = ChannelPolicy(first="canary", soak_s=100)
A, B = "a-00000000", "b-00000000"


class World:
    """A cohort of two nodes with one release on canary; `now` is seconds since the start."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.path = path
        self.open()
        self.genesis = self.registry.ensure_cohort("shared")
        self.journal.append(make.token_created(), make.node_enrolled(A), make.node_enrolled(B))
        self.canary = self.release("canary")

    def open(self) -> None:
        self.journal = Journal(f"sqlite:///{self.path}/journal.db", clock=self.clock)
        self.registry = Registry(self.journal, DirectoryBlobs(self.path / "blobs"), KEY, make.BASE)

    def clock(self) -> str:
        at = datetime.fromisoformat(make.AT) + timedelta(seconds=self.now)
        return at.isoformat(timespec="microseconds").replace("+00:00", "Z")

    def release(self, channel: str, sequence: int = 1) -> ReleaseRecord:
        update = make.make_update(self.genesis.manifest, sequence=sequence)
        plan = make.make_plan(self.head("stable").manifest, update)
        self.journal.append(make.admitted(update), make.planned(plan))
        manifest = self.registry.add_candidate(plan.digest, encode(LoraTensors()), 0.1)
        self.journal.append(make.decided(manifest, True))
        return self.registry.promote(manifest.digest, channel, "gate")

    def head(self, channel: str) -> ReleaseRecord:
        with self.journal.read() as state:
            head = state.head("shared", channel)
        assert head is not None
        return head

    def says(
        self, node: str, problem: str = "", channel: str = "canary", serving: str | None = None
    ) -> None:
        served = self.canary.release_id if serving is None else serving
        record_report(self.journal, node, "shared", channel, served, problem)

    def soak(self, policy: ChannelPolicy = POLICY) -> Soak:
        with self.journal.read() as state:
            soak = find_soak(state, "shared", policy)
        assert soak is not None
        return soak

    def look(self, now: float, policy: ChannelPolicy = POLICY, connected: bool = True) -> str:
        """Version that stable points at after central looked at the soak."""
        self.now = now
        watch = SoakWatch("shared", self.journal, policy, lambda node: connected, self.clock)
        with self.journal.read() as state:
            watch.look(state)
        return self.head("stable").release_id

    def plans(self) -> bool:
        with self.journal.read() as state:
            return plan_merge(state, "shared", MergePolicy(min_updates=1), self.clock()) is not None


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_canary_becomes_stable_after_its_soak(world: World) -> None:
    world.says(A, serving=world.genesis.release_id)  # it has not loaded it yet
    assert world.soak().promotes_at is None
    assert "EDGE_RELEASES__CHANNEL=canary" in world.soak().waits_for
    world.now = 50
    world.says(A)
    assert (world.soak().serving, world.soak().waits_for) == (
        (A,),
        "the end of 100 s without trouble",
    )
    assert world.look(149) == world.genesis.release_id
    assert world.look(150, connected=False) == world.genesis.release_id, (
        "nobody who serves it can be asked"
    )
    assert world.look(150) == world.canary.release_id
    with world.journal.read() as state:
        assert state.channels == {("shared", "stable"): world.canary.release_id}
        assert [change.by for change in state.channel_changes["shared", "canary"]] == [
            "gate",
            "central",
        ]
        assert state.soaking("shared") is None


def test_without_a_time_only_an_operator_promotes(world: World) -> None:
    by_hand = ChannelPolicy(first="canary")
    world.says(A)
    assert world.look(1e6, by_hand) == world.genesis.release_id
    assert world.soak(by_hand).waits_for == (
        f"`central releases promote {world.canary.manifest.label} --channel stable`"
    )
    world.registry.promote(world.canary.release_id, "stable", "ops")
    assert world.head("stable") == world.canary


def test_trouble_ends_the_soak_and_it_counts_anew_also_after_a_restart(world: World) -> None:
    world.says(A)
    world.now = 90
    world.says(B, "vLLM refused it")
    assert (world.soak().serving, world.soak().troubled) == ((A,), {B: "vLLM refused it"})
    assert world.look(500) == world.genesis.release_id
    world.journal.close()
    world.open()
    assert world.soak().troubled == {B: "vLLM refused it"}
    world.now = 500
    world.says(B)
    assert world.look(599) == world.genesis.release_id
    assert world.look(600) == world.canary.release_id


def test_a_node_that_leaves_the_channel_or_is_revoked_counts_no_longer(world: World) -> None:
    world.says(A)
    world.says(B, "trouble")
    world.now = 10
    world.says(B, channel="stable")
    assert (world.soak().serving, world.soak().troubled) == ((A,), {})
    assert world.look(110) == world.canary.release_id


def test_trouble_of_a_revoked_node_counts_no_longer(world: World) -> None:
    world.says(A)
    world.says(B, "trouble")
    world.journal.append(make.NewEvent(make.EventKind.NODE_REVOKED, "shared", B, {"by": "ops"}))
    world.says(B)
    assert world.look(100) == world.canary.release_id


def test_a_repeated_status_writes_nothing_and_a_flapping_node_is_left_in_trouble(
    world: World,
) -> None:
    for _ in range(3):
        world.says(A)
        world.says(B, channel="stable")
    with world.journal.read() as state:
        assert [r.condition for r in state.canary_reports[world.canary.release_id]] == ["serving"]
    for _ in range(2 * MAX_TROUBLES):
        world.says(A, "again")
        world.says(A)
    with world.journal.read() as state:
        reports = state.canary_reports[world.canary.release_id]
    assert [r.condition for r in reports] == ["serving", "trouble"] * MAX_TROUBLES
    assert world.look(1e6) == world.genesis.release_id


def test_nothing_is_merged_while_a_canary_soaks(world: World) -> None:
    waiting = make.make_update(world.canary.manifest, B, 2)
    world.journal.append(make.admitted(waiting))
    assert not world.plans()
    world.registry.promote(world.canary.release_id, "stable", "ops")
    assert world.plans()


@pytest.mark.parametrize(
    ("choice", "state_name"), [("requeue", "waiting"), ("set_aside", "set_aside")]
)
def test_rollback_of_a_canary_leaves_stable_and_frees_its_updates(
    world: World, choice: str, state_name: str
) -> None:
    done = world.registry.rollback("shared", None, choice, "ops", "canary")  # type: ignore[arg-type]
    assert (done.release.release_id, done.abandoned) == (
        world.genesis.release_id,
        (world.canary.release_id,),
    )
    with world.journal.read() as state:
        assert state.channels == {("shared", "stable"): world.genesis.release_id}
        assert [update.state for update in state.updates.values()] == [state_name]
    assert world.plans() == (choice == "requeue")
    world.says(A)  # a report that was on its way: nothing soaks
    with pytest.raises(Refused, match="has no canary ahead of the stable head"):
        world.registry.rollback("shared", None, "requeue", "ops", "canary")
    with pytest.raises(Refused, match="abandoned"):
        world.registry.promote(world.canary.release_id, "canary", "ops")


def test_a_canary_returns_to_stable_at_most(world: World) -> None:
    world.registry.promote(world.canary.release_id, "stable", "ops")
    second = world.release("canary", 2)
    with pytest.raises(
        Refused, match=f"from stable on. Expected one of: {world.canary.manifest.label}"
    ):
        world.registry.rollback("shared", world.genesis.release_id, "requeue", "ops", "canary")
    with pytest.raises(Refused, match=f"lacks what the canary {second.manifest.label} holds"):
        world.registry.promote(world.canary.release_id, "canary", "ops")
    with pytest.raises(Refused, match="Channel 'beta' is not known"):
        world.registry.rollback("shared", None, "requeue", "ops", "beta")
    body = {
        "from_release": second.release_id,
        "abandoned": [second.release_id, world.canary.release_id],
    }
    event = make.NewEvent(
        make.EventKind.ROLLED_BACK,
        "shared",
        world.genesis.release_id,
        {**body, "updates": "requeue", "by": "ops", "channel": "canary"},
    )
    with pytest.raises(JournalConflict, match="the stable head would be abandoned"):
        world.journal.append(event)


def test_rollback_of_stable_takes_the_canary_with_it(world: World) -> None:
    world.registry.promote(world.canary.release_id, "stable", "ops")
    second = world.release("canary", 2)
    done = world.registry.rollback("shared", None, "requeue", "ops")
    assert done.abandoned == (world.canary.release_id, second.release_id)
    with world.journal.read() as state:
        assert state.channels == {("shared", "stable"): world.genesis.release_id}
        assert len(state.waiting("shared")) == 2


def test_a_release_beside_the_line_is_refused(world: World) -> None:
    world.registry.promote(world.canary.release_id, "stable", "ops")
    with pytest.raises(Refused, match="is an ancestor of the stable head"):
        world.registry.promote(world.genesis.release_id, "canary", "ops")
