"""Forgetting on a real journal: what is exact, what the gate says, what is lost, crashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.cohort.strategies.moments import ServerState
from central.cohort.verify import verify_releases
from central.errors import Refused
from central.journal import EventKind, NewEvent
from central.operators.contributions import requeue
from protos.lora import decode
from tests.contract.cohort_loop import (
    KEY,
    Central,
    answering,
    make_settings,
    opened,
    result,
    take_steps,
)
from tests.contract.forgetting import (
    NODES,
    forget,
    history_without,
    increment,
    line,
    order_state,
    payload,
    release,
    remove,
    run_until,
    states,
)
from tests.contract.test_releases_verify import public_key


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


@pytest.mark.parametrize("strategy", ["product-mean", "FedAdam"])
def test_a_replay_is_bit_identical_to_a_history_without_the_node(
    central: Central, tmp_path: Path, strategy: str
) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1], strategy=strategy)
    ids = [release(central, version, strategy=strategy)[1] for version in (2, 3)]
    release(central, 4, (NODES[0], NODES[2]), strategy=strategy)
    before = line(central)
    expected = history_without(tmp_path / "other", central, [1, 2, 3, 4], ids)
    order = forget(central, "b-2")
    assert states(central, ids) == ["merged", "merged"], (
        "the stable head holds them until there is a release without them"
    )
    assert run_until(central, order, strategy=strategy) == "done"
    head = central.head()
    assert payload(central) == expected
    assert (head.manifest.version, head.manifest.parent, head.manifest.updates) == (
        5,
        before[-1].release_id,
        [],
    )
    assert states(central, ids) == ["forgotten", "forgotten"]
    with central.journal.read() as state:
        assert set(state.contributions(head.release_id)).isdisjoint(ids)
        assert [state.releases[r.release_id].state for r in before] == ["accepted"] * 2 + [
            "withdrawn"
        ] * 3
        removal = state.plans[head.plan_id or ""].plan.removal
        assert removal is not None
        assert (removal.merges, removal.since) == (3, before[1].release_id)
        found = list(
            verify_releases(state, state.releases.values(), central.blobs, public_key(KEY), False)
        )
    assert {finding.outcome for finding in found} == {"identical"}
    # What comes next builds on it, and what carries state goes on from the state without it.
    release(central, 6, (NODES[0], NODES[2]), strategy=strategy)
    with central.journal.read() as state:
        found = list(verify_releases(state, [central.head()], central.blobs, public_key(KEY), True))
    assert {finding.outcome for finding in found} == {"identical"}


def test_after_a_merge_is_taken_out_whole_the_strategy_goes_on_from_the_release_before(
    central: Central,
) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1], strategy="FedAdam")
    before = central.head()
    release(central, 2, NODES[1:2], strategy="FedAdam")
    assert run_until(central, forget(central, "b-2")) == "done"
    assert central.head().server_state == before.server_state
    release(central, 4, NODES[2:], strategy="FedAdam")
    state = ServerState.from_bytes(central.blobs.read(central.head().server_state or ""))
    assert state.merges == 2, "as if the merge of b had never been"


def test_without_the_payloads_of_a_replay_it_is_refused(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    release(central, 2)
    remove(central, ids[0])
    expected = (
        r"2 merges since v0-\w+ cannot be done again: 1 payloads are no longer kept.*return to "
        r"v0-\w+ with"
    )
    with pytest.raises(Refused, match=expected):
        forget(central, ids[1])
    with central.journal.read() as state:
        assert not state.forgets


def test_what_it_takes_out_is_not_read(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    remove(central, ids[1])
    assert run_until(central, forget(central, ids[1])) == "done"


def test_what_no_release_in_use_holds_is_forgotten_with_the_order(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    waiting = central.admit("b-2", increment(2, "b-2"), sequence=2)  # type: ignore[arg-type]
    aside = central.admit("b-2", increment(3, "b-2"), sequence=3)  # type: ignore[arg-type]
    central.journal.append(
        NewEvent(EventKind.UPDATE_SET_ASIDE, "shared", aside, {"reason": "tests"})
    )
    order = forget(central, "b-2")
    assert order_state(central, order) == "done"
    assert states(central, [waiting, aside]) == ["forgotten", "forgotten"]
    with pytest.raises(
        Refused,
        match=r"is forgotten; only one that is set aside can wait again. Nothing brings it back",
    ):
        requeue(central.journal, central.blobs, [aside], "tests")
    with pytest.raises(Refused, match="no update here that is not forgotten already"):
        forget(central, "b-2")
    with pytest.raises(Refused, match="is forgotten already: by order of tests"):
        forget(central, aside)


def test_a_merge_under_way_loses_what_is_forgotten_and_the_others_wait_again(
    central: Central,
) -> None:
    central.join("shared", *NODES)
    ids = [central.admit(node, increment(1, node)) for node in NODES]  # type: ignore[arg-type]
    take_steps(central, make_settings(quorum=1), lambda: "planned" in states(central, ids))
    assert order_state(central, forget(central, ids[1])) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    assert states(central, ids) == ["merged", "forgotten", "merged"]


def test_the_gate_decides_unless_the_operator_accepts_the_loss(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    before = payload(central)

    def lost(node: str) -> tuple[list, str]:
        return [result("acme", both=2, b=14, c=0, neither=4)], ""

    with answering(central.journal, lost):
        order = forget(central, "b-2")
        assert run_until(central, order, quorum=1) == "rejected"
        assert payload(central) == before
        assert states(central, ids) == ["merged"] * 3
        with central.journal.read() as state:
            assert "acme fell" in state.forgets[order].reason
            assert not state.isolations
        order = forget(central, "b-2", accept_loss=True)
        assert run_until(central, order, quorum=1) == "done"
    head = central.head()
    assert states(central, ids) == ["merged", "forgotten", "merged"]
    assert head.verdict is not None
    assert head.verdict.loss_accepted_by == "tests"
    assert head.verdict.text.startswith(
        "accepted by tests in spite of the gate, which rejected: acme fell"
    )
    with central.journal.read() as state:
        assert state.channel_changes[("shared", "stable")][-1].by == "tests"


def test_what_holds_it_can_no_longer_be_used_and_earlier_releases_can(central: Central) -> None:
    central.join("shared", *NODES)
    release(central, 1, NODES[:1])
    ids = release(central, 2)
    late = release(central, 3, (NODES[0], NODES[2]))
    _, first, second, third = line(central)
    central.registry.promote(third.release_id, "canary", "tests")
    assert run_until(central, forget(central, ids[1])) == "done"
    with central.journal.read() as state:
        assert ("shared", "canary") not in state.channels
        assert state.forgotten_in(third.release_id) == [ids[1]]
        assert state.forgotten_in(central.head().release_id) == []
    with pytest.raises(Refused, match="is withdrawn"):
        central.registry.promote(second.release_id, "canary", "tests")
    with pytest.raises(
        Refused, match=f"holds a contribution that was forgotten.*{first.manifest.label}"
    ):
        central.registry.rollback("shared", None, "requeue", "tests")
    central.registry.rollback("shared", first.release_id, "requeue", "tests")
    assert central.head().release_id == first.release_id
    assert states(central, [*ids, *late]) == [
        "waiting",
        "forgotten",
        "waiting",
        "waiting",
        "waiting",
    ]


def test_a_withdrawn_release_without_its_payloads_says_why_it_cannot_be_rebuilt(
    central: Central,
) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    release(central, 2)
    assert run_until(central, forget(central, ids[1])) == "done"
    remove(central, ids[1])
    with central.journal.read() as state:
        found = list(
            verify_releases(state, state.releases.values(), central.blobs, public_key(KEY), True)
        )
    assert [finding.outcome for finding in found] == [
        "identical",
        "forgotten",
        "identical",
        "identical",
    ]
    assert f"made with update {ids[1][:12]} of b-2, which was forgotten" in found[1].problem


def test_forgetting_again_goes_back_to_before_the_first(central: Central, tmp_path: Path) -> None:
    central.join("shared", *NODES)
    first = release(central, 1)
    second = release(central, 2)
    expected = history_without(tmp_path / "other", central, [1, 2], [first[0], second[1]])
    assert run_until(central, forget(central, first[0])) == "done"
    assert run_until(central, forget(central, second[1])) == "done"
    assert payload(central) == expected
    with central.journal.read() as state:
        assert sorted(state.contributions(central.head().release_id)) == sorted(
            {*first, *second} - {first[0], second[1]}
        )
    # The last of a node, of everybody: what is left is the base.
    for node in NODES:
        assert run_until(central, forget(central, node)) == "done"
    assert not decode(payload(central)).modules


def test_a_repeat_finds_the_order_and_a_part_of_one_waits(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    assert forget(central, ids[1]) == order
    late = central.admit("b-2", increment(2, "b-2"), sequence=2)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="is forgetting a part of this already"):
        forget(central, "b-2")
    assert run_until(central, order) == "done"
    assert states(central, [late]) == ["waiting"]


def test_a_rollback_before_it_is_merged_does_the_rest(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    central.registry.rollback("shared", None, "requeue", "tests")
    assert order_state(central, order) == "done"
    assert states(central, ids) == ["waiting", "forgotten", "waiting"]


def test_a_replay_that_cannot_be_made_ends_the_order_and_changes_nothing(central: Central) -> None:
    central.join("shared", *NODES)
    ids = release(central, 1)
    order = forget(central, ids[1])
    remove(central, ids[0])
    assert run_until(central, order) == "failed"
    assert states(central, ids) == ["merged"] * 3
    with central.journal.read() as state:
        assert "Restore" in state.forgets[order].reason
        assert state.open_plans("shared") == []
