"""Quarantine with real merges: a node that is blamed again is kept aside, others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.errors import Refused
from central.fleet.quarantine import quarantine_node, release_node
from central.fleet.revocation import revoke_node
from central.journal import EventKind
from central.settings import CentralSettings
from tests.contract.cohort_loop import (
    Central,
    answering,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)

NODES = ("a-1", "b-2")


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", *NODES)
        yield central


def settings(isolated_updates: int = 2, window: int = 3) -> CentralSettings:
    policy = make_settings(quorum=1)
    changed = policy.quarantine.model_copy(
        update={"isolated_updates": isolated_updates, "window": window}
    )
    return policy.model_copy(update={"quarantine": changed})


def one_round(
    central: Central, sequence: int, policy: CentralSettings, bad: str = "b-2"
) -> dict[str, str]:
    """Both nodes send; a measures that `bad` hurts. The state of each update afterwards."""
    sent = {
        node: central.admit(node, make_increment(10 * sequence + n), sequence=sequence)
        for n, node in enumerate(NODES)
    }
    with central.journal.read() as state:
        kept = {update.update_id for update in state.waiting("shared")}

    def measured(node: str) -> tuple[list, str]:
        if node != "a-1":
            return [], "busy"
        with central.journal.read() as state:
            candidate = next(r for r in state.releases.values() if r.state == "candidate")
        hurts = sent.get(bad) in candidate.manifest.updates
        return [result("acme", both=2, b=14, c=0, neither=4) if hurts else result("acme")], ""

    def settled() -> bool:
        with central.journal.read() as state:
            return all(state.updates[update].state not in ("waiting", "planned") for update in kept)

    with answering(central.journal, measured):
        for _ in range(3):  # take_steps gives up after ten
            try:
                take_steps(central, policy, settled)
                break
            except AssertionError:
                continue
    with central.journal.read() as state:
        return {node: state.updates[update].state for node, update in sent.items()}


def quarantine(central: Central, node: str = "b-2") -> str:
    with central.journal.read() as state:
        return state.nodes[node].quarantine


def test_a_node_that_is_blamed_often_enough_is_kept_aside_until_it_is_released(
    central: Central,
) -> None:
    assert one_round(central, 1, settings()) == {"a-1": "merged", "b-2": "set_aside"}
    assert quarantine(central) == "", "one veto is never final"
    assert one_round(central, 2, settings()) == {"a-1": "merged", "b-2": "set_aside"}
    assert quarantine(central) == "the gate rejected 2 of its last 2 updates, each alone"
    assert quarantine(central, "a-1") == ""
    third = central.admit("b-2", make_increment(77), sequence=3)
    with central.journal.read() as state:
        assert (state.updates[third].state, state.updates[third].reason) == (
            "quarantined",
            quarantine(central),
        )
        events = central.journal.events()
    verdicts = [
        e.sequence for e in events if e.kind is EventKind.VERDICT and not e.body["accepted"]
    ]
    (put,) = [e for e in events if e.kind is EventKind.NODE_QUARANTINED]
    assert (put.sequence, put.body["by"]) == (verdicts[-1] + 1, "gate"), (
        "in one append with the verdict"
    )
    assert [update.update_id for update in release_node(central.journal, "b-2", "tests")] == [third]
    with central.journal.read() as state:
        assert state.updates[third].state == "waiting"
        assert state.nodes["b-2"].judged == (), "it begins anew"


def test_verdicts_outside_the_window_and_a_policy_of_zero_do_not_count(central: Central) -> None:
    for sequence, bad in enumerate(("b-2", "nobody", "nobody", "b-2"), start=1):
        one_round(central, sequence, settings(), bad)
        assert quarantine(central) == ""
    for sequence in (5, 6):
        one_round(central, sequence, settings(isolated_updates=0))
    assert quarantine(central) == ""
    one_round(central, 7, settings())
    assert quarantine(central).startswith("the gate rejected 3 of its last 3")


def test_quarantine_during_a_merge_cancels_it_and_the_others_wait_again(central: Central) -> None:
    ids = [central.admit(node, make_increment(n)) for n, node in enumerate(NODES)]

    def planned() -> bool:
        with central.journal.read() as state:
            return bool(state.plans)

    take_steps(central, settings(), planned)
    quarantine_node(central.journal, "b-2", "odd", "tests")
    with central.journal.read() as state:
        assert [state.updates[update].state for update in ids] == ["waiting", "quarantined"]
        assert state.open_plans("shared") == []


def test_what_a_revoked_node_had_in_quarantine_never_waits_again(central: Central) -> None:
    quarantine_node(central.journal, "b-2", "odd answers", "operator")
    kept = central.admit("b-2", make_increment(1))
    revoke_node(central.journal, "b-2", "operator")
    with pytest.raises(Refused, match="is revoked; there is nothing to release"):
        release_node(central.journal, "b-2", "operator")
    with central.journal.read() as state:
        assert (state.updates[kept].state, state.updates[kept].reason) == (
            "set_aside",
            "its node was revoked",
        )
