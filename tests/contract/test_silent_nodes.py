"""A node that takes evaluations and gives no result holds up one candidate, not a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from central.cli.release_texts import explanation
from central.fleet.presence import NodePresence
from central.journal import EvaluationRecord, EventKind, Journal, JournalConflict, NewEvent
from central.operators.lineage import explain_release
from tests.contract.cohort_loop import Central, Reply, make_increment, make_loop, opened, take_steps
from tests.contract.looks import SAME, Clock, decide, measured, offers, settings

Answer = Callable[[EvaluationRecord, str], Reply | None]
DEADLINE_S, GRACE_S = 600, 400
ONE_LOOK = settings(20, deadline_s=DEADLINE_S, absent_grace_s=GRACE_S)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2", "c-3")
        yield central


@pytest.fixture
def clock(central: Central) -> Clock:
    return Clock(central)


def answers(**own: Callable[[EvaluationRecord], Reply | None]) -> Answer:
    """Node a has "own_a", b "own_b"; c abstains. `own` replaces what a node does."""

    def answer(offer: EvaluationRecord, node: str) -> Reply | None:
        name = node[0]
        if name in own:
            return own[name](offer)
        return result(offer, node) if name in "ab" else ([], "no environment")

    return answer


def result(offer: EvaluationRecord, node: str) -> Reply:
    return [measured(offer, node, f"own_{node[0]}", SAME)], ""


def hung(offer: EvaluationRecord) -> None:
    return None


def after(
    clock: Clock, seconds: int, reply: Callable[[EvaluationRecord], Reply]
) -> Callable[[EvaluationRecord], Reply | None]:
    """`reply`, so many seconds from now on."""
    begun = clock.seconds
    return lambda offer: reply(offer) if clock.seconds >= begun + seconds else None


def took(
    central: Central, clock: Clock, answer: Answer, sequence: int, **steps: object
) -> tuple[int, str]:
    """Seconds that the candidate took, and its verdict's text."""
    begun = clock.seconds
    text = decide(central, answer, ONE_LOOK, sequence, clock=clock, **steps)
    return clock.seconds - begun, text


def silent(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [node.node_id for node in state.nodes.values() if node.silent_since]


def test_a_node_that_hangs_costs_one_deadline_and_the_next_candidates_nothing(
    central: Central, clock: Clock, tmp_path: Path
) -> None:
    away = {"is_connected": lambda node: node != "b-2"}
    assert took(central, clock, answers(b=hung), 1, **away)[0] < DEADLINE_S
    first = central.head()
    assert took(central, clock, answers(), 2)[0] < GRACE_S
    assert took(central, clock, answers(b=hung), 3)[0] >= DEADLINE_S
    assert silent(central) == ["b-2"]
    for sequence in (4, 5):
        seconds, text = took(central, clock, answers(b=hung), sequence)
        assert seconds < GRACE_S, "not even the grace of a node that is away"
        assert text.startswith("accepted: no environment fell.")
        assert text.endswith(" Nobody judged own_b: no result of b-2.")
    assert [offer.nodes for offer in offers(central)] == [("a-1", "b-2", "c-3")] * 5, (
        "it is asked all the same"
    )
    with central.journal.read() as state:
        told, before = (
            explain_release(state, release, lambda node: NodePresence())
            for release in (central.head(), first)
        )
        since = state.nodes["b-2"].silent_since
        again = Journal(f"sqlite:///{tmp_path}/journal.db")
        with again.read() as replayed:
            assert replayed.nodes == state.nodes
        again.close()
    assert f"  b-2 does not count: no report, silent since {since}" in list(explanation(told))
    assert "  b-2 does not count: no report" in list(explanation(before)), "it was away then"
    assert [event.kind for event in central.journal.events()].count(EventKind.NODE_SILENT) == 1


def test_an_environment_that_a_node_leaves_out_of_its_result_is_named(
    central: Central, clock: Clock
) -> None:
    def both(offer: EvaluationRecord) -> Reply:
        more = measured(offer, "b-2", "more_b", SAME)
        return [*result(offer, "b-2")[0], more], ""

    _, text = took(central, clock, answers(b=both), 1)
    assert "more_b: 16 -> 16 of 20" in text
    _, text = took(central, clock, answers(), 2)
    assert text.startswith("accepted: no environment fell.")
    assert text.endswith(" Nobody judged more_b: no result of b-2.")
    _, text = took(central, clock, answers(b=both), 3)
    assert "Nobody judged" not in text


def test_its_result_counts_when_it_comes_in_time_and_then_it_is_waited_for_again(
    central: Central, clock: Clock
) -> None:
    took(central, clock, answers(b=hung), 1)
    b_first = answers(a=lambda offer: result(offer, "a-1") if "b-2" in offer.reports else None)
    _, text = took(central, clock, b_first, 2)
    assert "own_b: 16 -> 16 of 20" in text
    assert "Nobody judged" not in text
    assert silent(central) == []
    assert took(central, clock, answers(b=hung), 3)[0] >= DEADLINE_S


def test_a_result_after_the_verdict_does_not_count_but_is_waited_for_next_time(
    central: Central, clock: Clock
) -> None:
    for sequence in (1, 2):
        took(central, clock, answers(b=hung), sequence)
    verdict = central.head().verdict
    report(central, offers(central)[-1], "b-2")
    assert silent(central) == []
    assert central.head().verdict == verdict
    with central.journal.read() as state:
        told = explain_release(state, central.head(), lambda node: NodePresence())
    assert "  b-2 does not count: it came after the verdict" in list(explanation(told))
    slow = after(clock, GRACE_S + 50, lambda offer: result(offer, "b-2"))
    assert "own_b: " in took(central, clock, answers(b=slow), 3)[1]


def test_a_result_after_the_deadline_is_no_reason_to_wait(central: Central, clock: Clock) -> None:
    for sequence in (1, 2):
        took(central, clock, answers(b=hung), sequence)
    clock.seconds += DEADLINE_S
    report(central, offers(central)[-1], "b-2")
    assert silent(central) == ["b-2"]


def test_an_abstention_at_the_end_of_a_nodes_patience_is_as_good_as_silence(
    central: Central, clock: Clock
) -> None:
    gives_up = after(clock, DEADLINE_S - 100, lambda offer: ([], "TimeoutError"))
    assert took(central, clock, answers(b=gives_up), 1)[0] < DEADLINE_S
    assert silent(central) == ["b-2"], "not c, which said at once that it has nothing"
    gives_up = after(clock, DEADLINE_S - 100, lambda offer: ([], "TimeoutError"))
    assert took(central, clock, answers(b=gives_up), 2)[0] < GRACE_S
    abstained = {"node_id": "b-2", "results": [], "abstain_reason": "busy"}
    central.journal.append(
        NewEvent(EventKind.EVALUATION_REPORTED, "shared", offers(central)[-1].offer_id, abstained)
    )
    assert silent(central) == ["b-2"], "only a result shows that it evaluates again"


def test_who_is_hardly_slower_than_the_others_held_up_nobody(
    central: Central, clock: Clock
) -> None:
    slow = after(clock, 200, lambda offer: result(offer, "a-1"))
    gives_up = after(clock, DEADLINE_S - 100, lambda offer: ([], "TimeoutError"))
    took(central, clock, answers(a=slow, b=gives_up), 1)
    assert silent(central) == []


def test_when_only_silent_nodes_are_left_they_are_waited_for(
    central: Central, clock: Clock
) -> None:
    took(central, clock, answers(b=hung), 1)
    back = after(clock, DEADLINE_S + 100, lambda offer: result(offer, "b-2"))
    restarting = answers(a=lambda offer: ([], "vLLM is restarting"), b=back)
    seconds, text = took(central, clock, restarting, 2)
    assert seconds > DEADLINE_S, "the deadline, and the same question again"
    assert "own_b: " in text
    assert [offer.nodes for offer in offers(central)][1:] == [("a-1", "b-2", "c-3")] * 2
    assert silent(central) == []


def test_a_node_that_is_away_or_was_asked_by_a_central_that_was_away_is_not_silent(
    central: Central, clock: Clock
) -> None:
    seconds, _ = took(central, clock, answers(b=hung), 1, is_connected=lambda node: node != "b-2")
    assert GRACE_S <= seconds < DEADLINE_S
    late = after(clock, DEADLINE_S + 100, lambda offer: result(offer, "a-1"))
    took(central, clock, answers(a=late, b=hung), 2, is_connected=lambda node: node != "b-2")
    assert silent(central) == [], "a gave a result since"
    central.admit("a-1", make_increment(3), sequence=3)
    take_steps(central, ONE_LOOK, lambda: bool(candidates(central)), clock=clock)
    body = {
        "candidate": candidates(central)[0],
        "reference": central.head().release_id,
        "tasks": 20,
        "deadline_at": clock.at(),
        "nodes": ["a-1", "b-2", "c-3"],
    }
    clock.seconds -= DEADLINE_S
    central.journal.append(NewEvent(EventKind.EVALUATION_OFFERED, "shared", "before", body))
    clock.seconds += DEADLINE_S // 2  # it is back in the middle of the look
    make_loop(central, ONE_LOOK, clock=clock).step()
    assert silent(central) == []


def candidates(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [plan.candidate for plan in state.open_plans("shared") if plan.candidate]


def test_only_who_was_asked_and_gave_no_result_can_be_silent(
    central: Central, clock: Clock
) -> None:
    took(central, clock, answers(b=lambda offer: ([], "no environment")), 1)
    (offer,) = offers(central)
    central.join("zeta", "d-4")
    for node, problem in (
        ("a-1", "gave a result"),
        ("d-4", "is of cohort"),
        ("nobody", "not known"),
    ):
        with pytest.raises(JournalConflict, match=problem):
            central.journal.append(told_silent(node, offer))
    central.journal.append(told_silent("b-2", offer))
    with pytest.raises(JournalConflict, match="silent since '2026"):
        central.journal.append(told_silent("b-2", offer))


def told_silent(node: str, offer: EvaluationRecord) -> NewEvent:
    return NewEvent(EventKind.NODE_SILENT, "shared", node, {"offer_id": offer.offer_id})


def report(central: Central, offer: EvaluationRecord, node: str) -> None:
    body = {"node_id": node, "results": result(offer, node)[0], "abstain_reason": ""}
    central.journal.append(NewEvent(EventKind.EVALUATION_REPORTED, "shared", offer.offer_id, body))
