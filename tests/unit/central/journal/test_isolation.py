"""The search for the update that hurts: any outcome of any try, and its events in the state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from central.journal import Journal, JournalConflict, NewEvent
from central.journal.isolation import Isolation, after_verdict, bisect
from tests.unit.central import builders as make


def search(
    updates: list[str], accepts: Callable[[Sequence[str]], bool]
) -> tuple[list[str], list[str], int]:
    """(released, set aside, tries) after a rejected candidate of all `updates`.

    `accepts(group)` is the gate.
    """
    waiting, released, set_aside, tries = set(updates), [], [], 0
    isolation = after_verdict(
        None, "plan", waiting - set(updates), bisect((u[0], u) for u in updates)
    )
    while isolation is not None:
        group, tries = isolation.groups[0], tries + 1
        halves: tuple[tuple[str, ...], ...] = ()
        if accepts(group):
            released += group
        elif len(group) == 1:
            set_aside += group
        else:
            halves = bisect((u[0], u) for u in group)
        if not halves:
            waiting -= set(group)
        isolation = after_verdict(isolation, "part", waiting - set(group), halves)
    return released, set_aside, tries


@given(st.integers(2, 40), st.randoms())
def test_whatever_the_gate_says_every_update_is_decided_once(number: int, chance: Random) -> None:
    updates = [f"{index:02}" for index in range(number)]
    released, set_aside, tries = search(updates, lambda group: chance.random() < 0.5)
    assert sorted(released + set_aside) == updates
    assert tries <= 2 * number - 2


@given(st.integers(2, 64), st.data())
def test_one_bad_update_is_found_in_about_two_log_n_tries(number: int, data: st.DataObject) -> None:
    updates = [f"{index:02}" for index in range(number)]
    bad = data.draw(st.sampled_from(updates))
    _, set_aside, tries = search(updates, lambda group: bad not in group)
    assert set_aside == [bad]
    assert tries <= 2 * math.ceil(math.log2(number))


def test_one_nodes_updates_stay_together() -> None:
    assert bisect([("b", "1"), ("a", "2"), ("b", "3"), ("a", "4")]) == (("2", "4"), ("1", "3"))


def test_updates_that_no_longer_wait_are_dropped() -> None:
    current = Isolation("plan", 3, (("u", "v"), ("w",)))
    assert after_verdict(current, "part", {"v"}, ()) == Isolation("plan", 4, (("v",),))
    assert after_verdict(current, "part", set(), ()) is None


def test_isolation_in_the_state_is_applied_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    genesis = make.start_cohort(journal, nodes=("a-1", "b-2"))
    updates = [make.make_update(genesis, node) for node in ("a-1", "b-2")]
    plan = make.make_plan(genesis, *updates)
    candidate = make.make_candidate(plan)
    journal.append(*map(make.admitted, updates), make.planned(plan), make.built(candidate))
    rejected = make.decided(candidate, False)
    isolated = NewEvent(
        rejected.kind, rejected.cohort, rejected.subject, {**rejected.body, "isolate": True}
    )
    with pytest.raises(JournalConflict):
        journal.append(isolated, isolated)
    with journal.read() as state:
        assert not state.isolations
        assert {update.state for update in state.updates.values()} == {"planned"}
    journal.append(isolated)
    with journal.read() as state:
        assert [update.update_id for update in state.suspects("shared")] == [updates[0].digest]
        assert {update.state for update in state.updates.values()} == {"waiting"}
    part = make.make_plan(genesis, updates[0])
    alone = make.make_candidate(part)
    journal.append(make.planned(part), make.built(alone))
    whole = make.decided(alone, False)
    with pytest.raises(JournalConflict, match="cannot be isolated any further"):
        journal.append(
            NewEvent(whole.kind, whole.cohort, whole.subject, {**whole.body, "isolate": True})
        )
    journal.append(whole)
    with journal.read() as state:
        assert state.updates[updates[0].digest].reason.startswith("isolated: candidate v1-")
        assert [update.update_id for update in state.suspects("shared")] == [updates[1].digest]
        replayed = Journal(f"sqlite:///{tmp_path}/journal.db")
        with replayed.read() as again:
            assert again.isolations == state.isolations
        replayed.close()
    journal.close()
