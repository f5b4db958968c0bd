"""A node is revoked between two looks: whose tasks count, who is asked, what alpha is spent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from central.cohort.judging import Judge
from central.fleet.revocation import revoke_node
from central.journal import EvaluationRecord, EventKind, NewEvent
from tests.contract.cohort_loop import (
    Central,
    Reply,
    opened,
)
from tests.contract.looks import (
    FEWER,
    SAME,
    decide,
    measured,
    nodes_with,
    offers,
    settings,
)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        central.join("shared", "a-1", "b-2", "c-3")
        yield central


def test_a_revoked_nodes_tasks_no_longer_count(central: Central) -> None:
    answer = nodes_with(both=FEWER)

    def revoking(offer: EvaluationRecord, node: str) -> Reply | None:
        if offer.look == 2 and node == "a-1":
            with central.journal.read() as state:
                if not state.nodes["b-2"].revoked:
                    revoke_node(central.journal, "b-2", "operator")
        return answer(offer, node)

    text = decide(central, revoking, settings(80))
    assert "1 node)" in text


def test_a_quorum_that_a_revocation_breaks_between_looks_is_asked_for_anew(
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

    def revoked_at_the_second(offer: EvaluationRecord, node: str) -> Reply | None:
        if offer.look == 2 and node == "a-1":
            with central.journal.read() as state:
                if not state.nodes["a-1"].revoked:
                    central.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "a-1", {}))
        if node == "b-2" and len(offers(central)) < 3:
            return [], "busy"
        return answer(offer, node)

    text = decide(central, revoked_at_the_second, settings(40), clock=clock)
    assert [(offer.look, offer.nodes) for offer in offers(central)] == [
        (1, ("a-1", "b-2", "c-3")),
        (2, ("a-1",)),
        (1, ("b-2", "c-3")),
        (3, ("b-2",)),
    ]
    assert "both: 32 -> 32 of 40" in text
    assert "1 node)" in text


def test_after_a_first_look_that_was_asked_again_no_task_counts_twice_and_no_alpha_is_spent_twice(
    central: Central,
) -> None:
    second = 0

    def clock() -> str:
        nonlocal second
        second += 1
        return (
            f"2026-11-22T{12 + second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.000000Z"
        )

    answer = nodes_with(both=FEWER, own_a=SAME)

    def revoked_at_the_third(offer: EvaluationRecord, node: str) -> Reply | None:
        if node == "c-3":
            return (
                ([measured(offer, "c-3", "both", FEWER)], "")
                if len(offers(central)) > 3
                else ([], "busy")
            )
        if offer.look == 3:
            with central.journal.read() as state:
                if not state.nodes["b-2"].revoked:
                    central.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "b-2", {}))
            return None
        return answer(offer, node)

    decide(central, revoked_at_the_third, settings(160, quorum=2), clock=clock)
    assert [(offer.look, offer.nodes) for offer in offers(central)][:4] == [
        (1, ("a-1", "b-2", "c-3")),
        (2, ("a-1", "b-2")),
        (3, ("a-1", "b-2")),
        (1, ("c-3",)),
    ]
    fourth = offers(central)[4]
    assert fourth.suites["both"].first_task == 80, "nobody was asked the tasks after these before"
    # Two looks had spent on 80 tasks; the 60 of those who are left are no new share.
    assert (fourth.so_far["both"]["total"], fourth.so_far["both"]["spent"]) == (
        60,
        pytest.approx(80 / 160),
    )


def test_a_node_that_is_revoked_at_a_look_does_not_end_the_looks_of_the_others(
    central: Central,
) -> None:
    mild = (6, 3, 1, 0)
    answer = nodes_with(both=mild)

    def revoking(offer: EvaluationRecord, node: str) -> Reply | None:
        if offer.look == 2 and node == "a-1":
            with central.journal.read() as state:
                if not state.nodes["b-2"].revoked:
                    central.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "b-2", {}))
        return answer(offer, node)

    assert decide(central, revoking, settings(160, alpha=0.01)).startswith("rejected: both fell")


def _candidates(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [plan.candidate for plan in state.plans.values() if plan.candidate]


def test_no_node_is_revoked_between_the_verdict_and_its_record(
    central: Central, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that is revoked counts in no verdict that comes later in the journal."""
    revoking = threading.Thread(target=revoke_node, args=(central.journal, "b-2", "operator"))
    record = Judge._record

    def later(*arguments: Any) -> None:
        revoking.start()
        revoking.join(0.3)
        record(*arguments)

    monkeypatch.setattr(Judge, "_record", later)
    decide(central, nodes_with(both=SAME), settings(40))
    revoking.join()
    kinds = [event.kind for event in central.journal.events()]
    assert kinds.index(EventKind.VERDICT) < kinds.index(EventKind.NODE_REVOKED)
