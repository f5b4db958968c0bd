"""An evaluation in several looks, on a real journal: who is asked what, and crashes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from central.cohort.judging import Judge
from central.cohort.patience import Patience
from central.cohort.planning import parse_time
from central.journal import (
    EvaluationRecord,
    EvaluationReport,
    EventKind,
    NewEvent,
    PlanRecord,
    Suite,
)
from tests.contract.cohort_loop import (
    Central,
    Reply,
    answering_offers,
    crashing_at,
    make_increment,
    opened,
    take_steps,
)
from tests.contract.looks import (
    FEWER,
    KINDS,
    MIXED,
    SAME,
    WORSE,
    decide,
    measured,
    nodes_with,
    offers,
    settings,
    shrunk,
    waiting,
)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2", "c-3")
        yield central


def test_only_what_is_undecided_is_asked_again_and_only_from_those_who_have_it(
    central: Central,
) -> None:
    text = decide(central, nodes_with(both=MIXED, own_a=SAME), settings(tolerance_points=15))
    first, second, third, *more = offers(central)
    assert (first.look, first.nodes, first.suites, first.tasks) == (
        1,
        ("a-1", "b-2", "c-3"),
        {},
        20,
    )
    # Both nodes measured tasks of their own, so a look doubles 40 tasks with 20 of each.
    assert (second.look, second.nodes) == (2, ("a-1", "b-2"))
    assert second.suites == {
        "both": Suite(first_task=20, tasks=20),
        "own_a": Suite(first_task=20, tasks=20),
    }
    assert third.suites == {"both": Suite(40, 40)}
    assert third.tasks == 40
    assert third.so_far["both"]["total"] == 80
    assert third.so_far["own_a"]["standing"] == "fine"
    assert not more
    assert text.startswith("accepted: no environment fell. ")
    assert "both: 112 -> 112 of 160" in text
    assert "own_a: 32 -> 32 of 40" in text
    central.journal.verify()


def test_a_fall_that_the_first_look_cannot_show_is_found_by_the_next(central: Central) -> None:
    mild = (6, 3, 1, 0)
    assert decide(central, nodes_with(own_a=mild), settings(20)).startswith("accepted")
    assert decide(central, nodes_with(own_a=mild), sequence=2).startswith("rejected: own_a fell")
    assert [offer.look for offer in offers(central)] == [1, 1, 2, 3]


def test_one_fallen_environment_ends_it_at_once(central: Central) -> None:
    assert decide(central, nodes_with(both=WORSE, own_a=FEWER), settings(40)).startswith(
        "rejected: both fell"
    )
    assert len(offers(central)) == 1


def test_a_node_that_only_evaluates_is_a_suite_at_central(central: Central) -> None:
    """Node c uploads nothing; its held-out tasks reject what the others' cannot show."""

    def answer(offer: EvaluationRecord, node: str) -> Reply:
        if node != "c-3" or offer.suite("suite") is None:
            return [], "no environment"
        return [measured(offer, node, "suite", (6, 3, 1, 0))], ""

    assert decide(central, answer).startswith("rejected: suite fell")
    assert [(offer.look, offer.nodes) for offer in offers(central)][1:] == [
        (2, ("c-3",)),
        (3, ("c-3",)),
    ]


def test_nodes_that_vanish_between_looks_hold_up_nothing(central: Central) -> None:
    second = 0

    def clock() -> str:
        nonlocal second
        second += 1
        return f"2026-11-22T12:{second // 60:02}:{second % 60:02}.000000Z"

    answer = nodes_with(both=FEWER, own_a=FEWER)

    def vanishing(offer: EvaluationRecord, node: str) -> Reply | None:
        return answer(offer, node) if offer.look == 1 else None

    made = settings(absent_grace_s=20, deadline_s=3000)
    text = decide(
        central,
        vanishing,
        made,
        clock=clock,
        is_connected=lambda node: not any(o.look > 1 for o in offers(central)),
    )
    assert "Too few tasks to be sure of both, own_a" in text
    assert [offer.look for offer in offers(central)] == [1, 2]
    assert second < 300


def test_a_connected_node_that_hangs_at_a_later_look_holds_it_up_for_the_grace_only(
    central: Central,
) -> None:
    second = 0

    def clock() -> str:
        nonlocal second
        second += 1
        return (
            f"2026-11-22T{12 + second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.000000Z"
        )

    answer = nodes_with(both=FEWER)

    def hanging(offer: EvaluationRecord, node: str) -> Reply | None:
        return None if offer.look > 1 and node == "b-2" else answer(offer, node)

    text = decide(central, hanging, settings(320, deadline_s=3000), clock=clock)
    assert "both: " in text
    looks = offers(central)
    assert {node for offer in looks[2:] for node in offer.nodes} == {"a-1"}, (
        "who did not answer is not asked again"
    )
    assert looks[2].suites["both"].tasks == 60, "one node has to double what two had"
    assert second < 300, "long before the deadline"


def test_a_node_at_a_later_look_has_as_long_again_as_it_or_the_slowest_reporter_took(
    central: Central,
) -> None:
    """Its own pace counts: a slow node that others overtake is no node that hangs."""
    central.admit("a-1", make_increment(1))
    take_steps(central, settings(), lambda: len(_candidates(central)) == 1)
    at = "2026-11-22T12:{:02}:00.000000Z".format
    asked = {"candidate": _candidates(central)[0], "reference": central.head().release_id}
    # Offered at 12:00 and, with twice the tasks, at 12:10.
    first = {**asked, "tasks": 20, "deadline_at": at(20), "nodes": ["a-1", "b-2"]}
    second = {**asked, "tasks": 40, "deadline_at": at(50), "nodes": ["a-1", "b-2"], "look": 2}
    reports = {("one", "a-1"): 1, ("one", "b-2"): 4, ("two", "a-1"): 15}
    central.journal.append(
        NewEvent(EventKind.EVALUATION_OFFERED, "shared", "one", first),
        NewEvent(EventKind.EVALUATION_OFFERED, "shared", "two", second),
    )
    with central.journal.read() as state:
        for (offer_id, node), minute in reports.items():
            record = state.evaluations[offer_id]
            report = EvaluationReport(node, (), "", at(minute))
            state.evaluations[offer_id] = replace(record, reports={**record.reports, node: report})
        record = state.evaluations["two"]
        late = {"b-2": EvaluationReport("b-2", (), "", at(22))}

        def waits(minute: int, offer: EvaluationRecord = record, connected: bool = True) -> bool:
            gate = settings(deadline_s=1200, absent_grace_s=60).gate
            patience = Patience(gate, lambda node: connected, lambda: at(minute))
            patience.started = parse_time(at(10))
            return patience.waits_for(state, "b-2", offer)

        assert waits(26), (
            "4 minutes for 20 tasks are 8 for 40, twice that and the grace: until 12:27"
        )
        assert not waits(27)
        assert waits(34, replace(record, reports=late)), "somebody took 12 minutes: until 12:35"
        assert not waits(35, replace(record, reports=late))
        assert not waits(12, connected=False)
        assert waits(27, state.evaluations["one"]), "at the first look until its deadline"


def test_a_look_that_ended_while_central_was_away_is_offered_again(central: Central) -> None:
    answer = nodes_with(own_a=(6, 3, 1, 0))
    central.admit("a-1", make_increment(1))
    with answering_offers(
        central.journal, lambda offer, node: answer(offer, node) if offer.look == 1 else None
    ):
        take_steps(central, settings(), lambda: any(offer.look == 2 for offer in offers(central)))
    ended = offers(central)[-1].offer_id

    def again(offer: EvaluationRecord, node: str) -> Reply | None:
        return None if offer.offer_id == ended else answer(offer, node)

    text = decide(central, again, sequence=0, clock=lambda: "2026-11-22T18:00:00.000000Z")
    assert text.startswith("rejected: own_a fell")
    assert [offer.look for offer in offers(central)] == [1, 2, 2, 3]


def test_an_environment_without_further_tasks_is_decided_on_what_there_is(central: Central) -> None:
    def finite(offer: EvaluationRecord, node: str) -> Reply:
        suite = offer.suite("own_a")
        if node != "a-1" or suite is None:
            return [], "nothing"
        left = max(0, min(suite.tasks, 30 - suite.first_task))
        found = measured(offer, node, "own_a", FEWER)
        return [{**found, "both_passed": left, **dict.fromkeys(KINDS, 0)}] if left == 0 else [
            shrunk(found, left)
        ], ""

    text = decide(central, finite)
    assert [offer.look for offer in offers(central)] == [1, 2]
    assert "of 30 " in text


def test_an_offer_for_several_attempts_carries_them_to_every_look(central: Central) -> None:
    answer = nodes_with(own_a=FEWER)

    def several(offer: EvaluationRecord, node: str) -> Reply:
        results, reason = answer(offer, node)
        every = {"both_passed": 2, "only_reference_passed": 0, "only_candidate_passed": 0}
        return [
            {
                **found,
                "attempts": 3,
                "every_attempt": {**every, "neither_passed": offer.suite("own_a").tasks - 2},
            }  # type: ignore[union-attr]
            for found in results
        ], reason

    text = decide(central, several, settings(40, attempts=3, temperature=0.5))
    assert {(offer.attempts, offer.temperature) for offer in offers(central)} == {(3, 0.5)}
    assert (
        "own_a: 32 -> 32 of 40 (only reference 4, only candidate 4, p 0.64), all 3 attempts 4 -> 4 "
        "of 40" in text
    )


# Crashes.


def test_a_crash_at_any_append_ends_with_the_same_looks_and_verdict(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    with opened(origin) as central:
        central.join("shared", "a-1", "b-2", "c-3")
        central.admit("a-1", make_increment(1))
    ends, crashes, point = set(), 0, 0
    while True:
        root = tmp_path / str(point)
        shutil.copytree(origin, root)
        crashed = _run_with_crash(root, point)
        crashes += crashed
        if crashed:
            assert not _run_with_crash(root, None)
        with opened(root) as central, central.journal.read() as state:
            assert central.journal.verify() == state.sequence
            looks = tuple(
                (offer.look, *sorted(offer.suites.items())) for offer in state.evaluations.values()
            )
            assert central.head().verdict is not None
            ends.add((central.head().release_id, central.head().verdict.text, looks))  # type: ignore[union-attr]
        if not crashed:
            break
        point += 1
    # Offer, plan, candidate, three looks, verdict: each with a crash before and after it.
    assert crashes == 2 * 7
    assert len(ends) == 1


def _run_with_crash(root: Path, crash_at: int | None) -> bool:
    """True when it crashed."""
    with opened(root) as central:
        with crashing_at(central, crash_at) as crash:
            decide(
                central,
                nodes_with(both=MIXED, own_a=SAME),
                settings(tolerance_points=15),
                sequence=0,
            )
        return crash.happened


def _candidates(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [plan.candidate for plan in state.plans.values() if plan.candidate]


def test_a_rollback_just_after_a_look_leaves_no_offer_of_the_next(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide(central, nodes_with(both=SAME))
    hear = Judge._hear

    def heard_then_rolled_back(self: Judge, planned: PlanRecord, candidate: str) -> bool:
        heard = hear(self, planned, candidate)
        central.registry.rollback("shared", None, "set_aside", "operator")
        return heard

    monkeypatch.setattr(Judge, "_hear", heard_then_rolled_back)
    central.admit("a-1", make_increment(2), sequence=2)
    before = len(offers(central))
    with answering_offers(central.journal, nodes_with(both=MIXED)):
        take_steps(central, settings(), lambda: not waiting(central))
    assert [offer.look for offer in offers(central)[before:]] == [1]
