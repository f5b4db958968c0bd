"""Isolation with real merges: which update hurts, what becomes of the others, crashes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest

from central.fleet.revocation import revoke_node
from central.journal import EventKind, NewEvent, PlanRecord, UpdateRecord
from central.settings import CentralSettings
from tests.contract.cohort_loop import (
    NAMES,
    Central,
    answering,
    crashing_at,
    dense,
    make_increment,
    make_settings,
    opened,
    result,
    take_steps,
)

NODES = ("a-1", "b-2", "c-3", "d-4", "e-5")


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def admit_all(central: Central, number: int = 5) -> list[str]:
    central.join("shared", *NODES[:number])
    return [
        central.admit(node, make_increment(seed, rank=1))
        for seed, node in enumerate(NODES[:number])
    ]


def measured(
    central: Central, hurts: Callable[[Collection[str]], bool]
) -> Callable[[str], tuple[list, str]]:
    """Node a measures: a candidate falls when the updates in its line hurt. The others abstain."""

    def answer(node: str) -> tuple[list, str]:
        if node != "a-1":
            return [], "busy"
        with central.journal.read() as state:
            candidate = next(r for r in state.releases.values() if r.state == "candidate")
            held = {
                update for r in state.lineage(candidate.release_id) for update in r.manifest.updates
            }
        return [result("acme", both=2, b=14, c=0, neither=4) if hurts(held) else result("acme")], ""

    return answer


def run(
    central: Central,
    hurts: Callable[[Collection[str]], bool],
    settings: CentralSettings | None = None,
    until: Callable[[], bool] | None = None,
) -> None:
    settings = settings or make_settings(quorum=1)
    with answering(central.journal, measured(central, hurts)):
        for _ in range(8):  # take_steps gives up after ten
            try:
                take_steps(central, settings, until or (lambda: settled(central)))
                return
            except AssertionError:
                continue
    raise AssertionError("the search did not end")


def settled(central: Central) -> bool:
    return not any(update.state in ("waiting", "planned") for update in updates(central).values())


def updates(central: Central) -> dict[str, UpdateRecord]:
    with central.journal.read() as state:
        return dict(state.updates)


def plans(central: Central) -> list[PlanRecord]:
    with central.journal.read() as state:
        return list(state.plans.values())


def merged(central: Central) -> list[str]:
    """Updates in the head's line, each as often as it was merged."""
    with central.journal.read() as state:
        line = state.lineage(central.head().release_id)
    return sorted(update for release in line for update in release.manifest.updates)


@pytest.mark.parametrize("culprit", range(5))
def test_the_update_that_hurts_is_set_aside_and_the_others_are_released(
    central: Central, culprit: int
) -> None:
    ids = admit_all(central)
    run(central, lambda held: ids[culprit] in held)
    assert merged(central) == sorted(set(ids) - {ids[culprit]})
    record = updates(central)[ids[culprit]]
    assert record.state == "set_aside"
    assert record.reason.startswith("isolated: candidate v")
    assert "of this update alone was rejected: rejected: acme fell" in record.reason
    expected = sum(
        0.2 * dense(make_increment(seed, rank=1), NAMES[0]) for seed in range(5) if seed != culprit
    )
    np.testing.assert_allclose(central.product(central.head(), NAMES[0]), expected, atol=1e-4)
    first, *tried = plans(central)
    assert first.isolates is None
    assert {plan.isolates for plan in tried} == {first.plan_id}
    assert len(tried) <= 6
    with central.journal.read() as state:
        assert not state.isolations
        assert central.journal.verify() == state.sequence


def test_updates_that_hurt_only_together_cost_one_of_them(central: Central) -> None:
    ids = admit_all(central)
    run(central, lambda held: {ids[1], ids[2]} <= set(held))
    assert len(merged(central)) == 4
    assert [update for update in ids if updates(central)[update].state == "set_aside"] in (
        [ids[1]],
        [ids[2]],
    )


def test_when_all_hurt_the_search_ends_and_keeps_them_all(central: Central) -> None:
    ids = admit_all(central)
    run(central, bool)
    assert central.head().manifest.version == 0
    assert [updates(central)[update].state for update in ids] == ["set_aside"] * 5
    assert len(plans(central)) == 2 * 5 - 1


@pytest.mark.parametrize(("tries", "expected"), [(0, 1), (1, 5), (2, 7)])
def test_the_number_of_tries_is_bounded(central: Central, tries: int, expected: int) -> None:
    admit_all(central)
    settings = make_settings(quorum=1)
    gate = settings.gate.model_copy(update={"isolation_tries": tries})
    run(central, bool, settings.model_copy(update={"gate": gate}))
    assert len(plans(central)) == expected
    assert {update.state for update in updates(central).values()} == {"set_aside"}
    assert all("was rejected" in update.reason for update in updates(central).values())


def test_a_part_is_as_strong_as_it_was_in_the_whole_with_any_strategy(central: Central) -> None:
    ids = admit_all(central, 3)
    run(
        central,
        lambda held: ids[2] in held,
        make_settings(quorum=1, strategy="FedAvg", server_step=1.5),
    )
    assert merged(central) == sorted(ids[:2])
    whole, *parts = [plan.plan for plan in plans(central)]
    for part in parts:
        assert part.server_step == pytest.approx(1.5 * len(part.updates) / 3)
        assert {update.weight for update in part.updates} == {whole.updates[0].weight}


def test_new_updates_wait_until_the_search_is_over(central: Central) -> None:
    ids = admit_all(central)
    run(central, lambda held: ids[4] in held, until=lambda: len(plans(central)) == 2)
    late = [
        central.admit(node, make_increment(20 + n), sequence=2) for n, node in enumerate(NODES[:2])
    ]
    run(central, lambda held: ids[4] in held)
    *tried, last = plans(central)
    assert [update.update_id for update in last.plan.updates] == late
    assert last.isolates is None
    assert not any(update.update_id in late for plan in tried for update in plan.plan.updates)
    assert merged(central) == sorted({*ids, *late} - {ids[4]})


def test_suspects_that_are_revoked_or_superseded_are_left_out(central: Central) -> None:
    ids = admit_all(central)
    run(
        central,
        bool,
        until=lambda: len(plans(central)) == 2 and plans(central)[1].candidate is not None,
    )
    revoke_node(central.journal, "d-4", "operator")
    newer = central.admit("e-5", make_increment(50), sequence=2)
    central.journal.append(NewEvent(EventKind.UPDATE_SUPERSEDED, "shared", ids[4], {"by": newer}))
    run(central, lambda held: False, make_settings(quorum=1, min_updates=1))
    assert merged(central) == sorted([*ids[:3], newer])
    assert [updates(central)[update].state for update in ids[3:]] == ["set_aside", "superseded"]
    with central.journal.read() as state:
        assert not state.suspects("shared")


@pytest.mark.parametrize("choice", ["requeue", "set_aside"])
def test_a_rollback_during_the_search(central: Central, choice: str) -> None:
    ids = admit_all(central)
    run(central, lambda held: ids[4] in held, until=lambda: central.head().manifest.version == 1)
    released = merged(central)
    central.registry.rollback("shared", None, choice, "operator")  # type: ignore[arg-type]
    run(central, lambda held: ids[4] in held, make_settings(quorum=1, min_updates=1))
    kept = set(ids) - {ids[4]} - (set(released) if choice == "set_aside" else set())
    assert merged(central) == sorted(kept)
    assert {update.state for update in updates(central).values()} == {"merged", "set_aside"}


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_at_any_append_ends_the_same(stride: int, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    with opened(origin) as central:
        ids = admit_all(central, 3)
    ends, crashes, point = set(), 0, 0
    while True:
        root = tmp_path / str(point)
        shutil.copytree(origin, root)
        crashed = _run_with_crash(root, ids[1], point)
        crashes += crashed
        if crashed:
            assert not _run_with_crash(root, ids[1], None)
        with opened(root) as central, central.journal.read() as state:
            assert central.journal.verify() == state.sequence
            assert merged(central) == sorted([ids[0], ids[2]])
            assert updates(central)[ids[1]].state == "set_aside"
            ends.add((central.head().release_id, len(state.plans)))
        if not crashed:
            break
        point += stride
    # Offer; the whole and four parts ({0, 1}, {0}, {1}, {2}) with plan, candidate, evaluation and
    # verdict each.
    assert crashes == -(-2 * (1 + 5 * 4) // stride)
    assert len(ends) == 1


def _run_with_crash(root: Path, culprit: str, crash_at: int | None) -> bool:
    """True when it crashed."""
    with opened(root) as central:
        with crashing_at(central, crash_at) as crash:
            run(central, lambda held: culprit in held)
        return crash.happened
