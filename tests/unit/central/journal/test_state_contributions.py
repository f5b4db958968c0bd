"""Quarantine, forgetting and serving in the state: which moves are legal, and that a refused append
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.journal import EventKind, Journal, JournalConflict, MergePlan, NewEvent
from central.journal.plan import Removal
from central.journal.removal import exactness, line_of, taken_out
from protos.manifest import ReleaseManifest, UpdateManifest
from tests.unit.central import builders as make

NODES = ("a-00000000", "b-00000000")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    yield journal
    with journal.read() as state:
        replayed = Journal(f"sqlite:///{tmp_path}/journal.db")
        with replayed.read() as again:
            assert (again.updates, again.nodes, again.forgets) == (
                state.updates,
                state.nodes,
                state.forgets,
            )
            assert (again.releases, again.served, again.serving) == (
                state.releases,
                state.served,
                state.serving,
            )
        replayed.close()
    journal.close()


def admit(journal: Journal, start: ReleaseManifest, sequence: int = 1) -> list[UpdateManifest]:
    updates = [make.make_update(start, node, sequence) for node in NODES]
    journal.append(*map(make.admitted, updates))
    return updates


def released(
    journal: Journal, parent: ReleaseManifest, *updates: UpdateManifest
) -> ReleaseManifest:
    plan = make.make_plan(parent, *updates)
    candidate = make.make_candidate(plan)
    journal.append(
        make.planned(plan),
        make.built(candidate),
        make.decided(candidate, True),
        make.promoted(candidate),
    )
    return candidate


def event(kind: EventKind, subject: str, **body: object) -> NewEvent:
    return NewEvent(kind, "shared", subject, body)


def ordered(*updates: UpdateManifest, order: str = "o1") -> NewEvent:
    ids = [update.digest for update in updates]
    return event(
        EventKind.FORGET_ORDERED, order, node_id="", updates=ids, accept_loss=False, by="tests"
    )


def removal_plan(
    parent: ReleaseManifest, since: ReleaseManifest, *updates: UpdateManifest
) -> MergePlan:
    removal = Removal(
        order="o1",
        since=since.digest,
        updates=make.make_plan(since, *updates).updates,
        merges=1,
    )
    return make.make_plan(parent).model_copy(update={"removal": removal})


def states(journal: Journal) -> list[str]:
    with journal.read() as state:
        return [update.state for update in state.updates.values()]


def test_a_node_is_quarantined_once_and_released_once(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    admit(journal, genesis)
    quarantine = event(EventKind.NODE_QUARANTINED, NODES[1], reason="odd", by="tests")
    with pytest.raises(JournalConflict, match="in quarantine: 'odd'"):
        journal.append(quarantine, quarantine)
    assert states(journal) == ["waiting", "waiting"], "all or nothing"
    with pytest.raises(JournalConflict, match="it is not in quarantine"):
        journal.append(event(EventKind.NODE_RELEASED, NODES[1], by="tests"))
    with pytest.raises(JournalConflict, match="is of cohort 'shared'"):
        journal.append(NewEvent(quarantine.kind, "zeta", NODES[1], quarantine.body))
    journal.append(quarantine)
    late = make.make_update(genesis, NODES[1], 2)
    journal.append(
        make.admitted(late), event(EventKind.UPDATE_SET_ASIDE, late.digest, reason="tests")
    )
    assert states(journal) == ["waiting", "quarantined", "set_aside"]
    with pytest.raises(JournalConflict, match="its node is in quarantine: odd"):
        journal.append(event(EventKind.UPDATE_REQUEUED, late.digest, by="tests"))
    journal.append(event(EventKind.NODE_RELEASED, NODES[1], by="tests"))
    assert states(journal) == ["waiting", "waiting", "set_aside"]


def test_a_rollback_gives_a_quarantined_nodes_updates_back_to_quarantine(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    first = released(journal, genesis, *admit(journal, genesis))
    journal.append(event(EventKind.NODE_QUARANTINED, NODES[1], reason="odd", by="tests"))
    assert states(journal) == ["merged", "merged"], "what was merged stays"
    journal.append(make.rolled_back(genesis, first))
    assert states(journal) == ["waiting", "quarantined"]


def test_only_what_was_ordered_and_the_parent_holds_is_taken_out(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    updates = admit(journal, genesis)
    first = released(journal, genesis, *updates)
    with pytest.raises(JournalConflict, match="order 'o1' is not known"):
        journal.append(make.planned(removal_plan(first, genesis, updates[1])))
    with pytest.raises(JournalConflict, match="or is ordered"):
        journal.append(ordered(updates[1]), ordered(updates[1], order="o2"))
    journal.append(ordered(updates[1]))
    for parent, removed in ((first, updates), (first, updates[:1]), (genesis, updates[1:])):
        with pytest.raises(JournalConflict, match="parent holds"):
            journal.append(make.planned(removal_plan(parent, genesis, *removed)))
    plan = removal_plan(first, genesis, updates[1])
    candidate = make.make_candidate(plan)
    journal.append(make.planned(plan), make.built(candidate))
    assert states(journal) == ["merged", "merged"]
    journal.append(make.decided(candidate, True), make.promoted(candidate))
    assert states(journal) == ["merged", "forgotten"]
    with journal.read() as state:
        assert [release.state for release in state.releases.values()] == [
            "accepted",
            "withdrawn",
            "accepted",
        ]
        assert state.contributions(candidate.digest) == [updates[0].digest]
        assert state.holders("shared", [updates[1].digest]).keys() == {first.digest}
        assert state.nodes[NODES[0]].judged == (False,), "a removal judges nobody"
    for refused, why in (
        (make.promoted(first, "canary"), "is withdrawn"),
        (make.rolled_back(first, candidate), "is withdrawn"),
        (event(EventKind.UPDATE_REQUEUED, updates[1].digest), "is forgotten"),
        (ordered(updates[1], order="o2"), "is forgotten"),
        (event(EventKind.FORGET_FAILED, "o1", reason="late"), "is done"),
    ):
        with pytest.raises(JournalConflict, match=why):
            journal.append(refused)


def test_a_removal_that_is_cancelled_is_planned_anew(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    updates = admit(journal, genesis)
    first = released(journal, genesis, updates[0])
    second = released(journal, first, updates[1])
    journal.append(ordered(updates[0]))
    plan = removal_plan(second, genesis, updates[0])
    journal.append(make.planned(plan), make.built(make.make_candidate(plan)))
    journal.append(make.rolled_back(first, second))
    with journal.read() as state:
        assert (state.forgets["o1"].state, state.forgets["o1"].plan_id) == ("ordered", None)
        assert state.open_plans("shared") == []
    assert states(journal) == ["merged", "waiting"]


def test_a_rejected_removal_leaves_everything_as_it_was(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    updates = admit(journal, genesis)
    first = released(journal, genesis, *updates)
    journal.append(ordered(updates[0]))
    plan = removal_plan(first, genesis, updates[0])
    candidate = make.make_candidate(plan)
    journal.append(
        make.planned(plan), make.built(candidate), make.decided(candidate, False, "acme fell")
    )
    assert states(journal) == ["merged", "merged"]
    with journal.read() as state:
        assert (state.forgets["o1"].state, state.forgets["o1"].reason) == ("rejected", "acme fell")
        assert state.pending_forgets("shared") == []
    journal.append(ordered(updates[0], order="o2"))


def test_an_order_that_fails_ends_its_plan(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    updates = admit(journal, genesis)
    first = released(journal, genesis, *updates)
    journal.append(ordered(updates[0]), make.planned(removal_plan(first, genesis, updates[0])))
    failed = event(EventKind.FORGET_FAILED, "o1", reason="its payloads are gone")
    with pytest.raises(JournalConflict, match="the order of cohort 'shared' is planned"):
        journal.append(NewEvent(failed.kind, "acme", "o1", failed.body))
    journal.append(failed)
    with journal.read() as state:
        order = state.forgets["o1"]
        assert (order.state, order.plan_id) == ("failed", None)
        assert order.reason == "its payloads are gone"
        assert state.open_plans("shared") == []
    assert states(journal) == ["merged", "merged"]


def test_a_removal_that_is_rolled_back_from_canary_fails(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    updates = admit(journal, genesis)
    first = released(journal, genesis, *updates)
    plan = removal_plan(first, genesis, updates[0])
    candidate = make.make_candidate(plan)
    journal.append(
        ordered(updates[0]),
        make.planned(plan),
        make.built(candidate),
        make.decided(candidate, True),
        make.promoted(candidate, "canary"),
    )
    back = make.rolled_back(first, candidate)
    journal.append(NewEvent(back.kind, "shared", back.subject, {**back.body, "channel": "canary"}))
    with journal.read() as state:
        order = state.forgets["o1"]
        assert (order.state, order.plan_id) == ("failed", None)
        assert order.reason == "its release was rolled back from canary"
    assert states(journal) == ["merged", "merged"]
    journal.append(ordered(updates[0], order="o2"))


def test_where_a_release_serves_is_kept_by_period(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    first = released(journal, genesis, *admit(journal, genesis))
    for release in (genesis, first, genesis):
        journal.append(event(EventKind.RELEASE_SERVED, release.digest, node_id=NODES[0]))
    with journal.read() as state:
        assert [bool(period.until) for period in state.served[genesis.digest]] == [True, False]
        assert [bool(period.until) for period in state.served[first.digest]] == [True]
        assert state.serving[NODES[0]].release_id == genesis.digest
    with pytest.raises(JournalConflict, match="'nobody' is not known"):
        journal.append(event(EventKind.RELEASE_SERVED, genesis.digest, node_id="nobody"))


def test_a_line_goes_back_to_before_the_first_merge_of_what_goes(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=NODES)
    one, two = admit(journal, genesis), admit(journal, genesis, 2)
    first = released(journal, genesis, *one)
    second = released(journal, first, *two)
    with journal.read() as state:
        head = state.releases[second.digest]
        assert line_of(state, head, [two[0].digest]).since.release_id == first.digest
        line = line_of(state, head, [two[0].digest, one[1].digest])
        assert (line.since.release_id, len(line.merges)) == (genesis.digest, 2)
        assert [(u.update_id, u.weight) for u in taken_out(line, {two[0].digest})] == [
            (two[0].digest, 0.5)
        ]


def test_exactness_is_said_in_words() -> None:
    assert exactness("v1-aa", 1).startswith("exact: the 1 merge since v1-aa are done again")
    assert "the 2 merges since v1-aa" in exactness("v1-aa", 2)
