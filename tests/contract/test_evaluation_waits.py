"""Whom an evaluation waits for: silent, away and revoked nodes, and a rollback meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from central.fleet.revocation import revoke_node
from central.journal import Event, EventKind, NewEvent
from tests.contract.cohort_loop import (
    Central,
    answering,
    make_increment,
    make_loop,
    make_settings,
    opened,
    result,
    take_steps,
)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def test_a_silent_node_holds_up_nothing_and_too_few_results_are_asked_again(
    central: Central,
) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    minute = 0

    def clock() -> str:  # every look at the clock is a second later
        nonlocal minute
        minute += 1
        return (
            f"2026-11-22T{12 + minute // 3600:02}:{minute // 60 % 60:02}:{minute % 60:02}.000000Z"
        )

    def offers() -> list[Event]:
        return [
            event
            for event in central.journal.events()
            if event.kind == EventKind.EVALUATION_OFFERED
        ]

    with answering(
        central.journal,
        lambda node: ([result("acme-a")], "") if node == "a-1" and len(offers()) > 1 else None,
    ):
        take_steps(
            central,
            make_settings(quorum=1),
            lambda: central.head().manifest.version == 1,
            clock=clock,
        )
    assert len(offers()) == 2
    assert central.head().verdict.environments["acme-a"]["nodes"] == 1  # type: ignore[union-attr]


def test_a_node_that_is_away_is_waited_for_only_the_grace(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))
    second = 0

    def clock() -> str:
        nonlocal second
        second += 1
        return f"2026-11-22T12:{second // 60:02}:{second % 60:02}.000000Z"

    settings = make_settings(quorum=1)
    with answering(
        central.journal, lambda node: ([result("acme-a")], "") if node == "a-1" else None
    ):
        take_steps(
            central,
            settings.model_copy(
                update={"gate": settings.gate.model_copy(update={"deadline_s": 3000})}
            ),
            lambda: central.head().manifest.version == 1,
            clock=clock,
            is_connected=lambda node: node == "a-1",
        )
    assert 30 <= second < 300, "after the grace, long before the deadline"


def test_a_revoked_node_is_not_waited_for(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for number, node in enumerate(("a-1", "b-2")):
        central.admit(node, make_increment(number))

    def answer(node: str) -> tuple[list[dict[str, object]], str] | None:
        return ([result("acme-a")], "") if node == "a-1" else None

    unsubscribe = central.journal.add_listener(
        lambda event: revoke.set() if event.kind == EventKind.EVALUATION_REPORTED else None
    )
    revoke = threading.Event()

    def operator() -> None:
        assert revoke.wait(20)
        central.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "b-2", {}))

    thread = threading.Thread(target=operator)
    thread.start()
    with answering(central.journal, answer):
        take_steps(central, make_settings(quorum=1), lambda: central.head().manifest.version == 1)
    thread.join()
    unsubscribe()
    assert central.head().manifest.version == 1


def test_a_node_revoked_during_evaluation_is_left_out_of_the_release(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    kept, _ = [
        central.admit(node, make_increment(number)) for number, node in enumerate(("a-1", "b-2"))
    ]
    settings = make_settings(quorum=1, min_updates=1)
    asked: list[str] = []

    def answer(node: str) -> tuple[list[dict[str, object]], str]:
        asked.append(node)
        if len(asked) == 1:
            revoke_node(central.journal, "b-2", "operator")
        return [result("acme-a")], ""

    with answering(central.journal, answer):
        take_steps(central, settings, lambda: central.head().manifest.version == 1)
    assert central.head().manifest.updates == [kept]
    with central.journal.read() as state:
        assert sorted(update.state for update in state.updates.values()) == ["merged", "set_aside"]


def test_a_rollback_during_evaluation_cancels_and_requeues(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    for sequence in (1, 2):
        for number, node in enumerate(("a-1", "b-2")):
            central.admit(node, make_increment(10 * sequence + number), sequence=sequence)
        if sequence == 1:
            take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    waiting = [update.update_id for update in _waiting(central)]

    def roll_back_once(node: str) -> None:
        if central.head().manifest.version == 1:
            central.registry.rollback("shared", None, "requeue", "operator")

    take_steps(central, make_settings(quorum=1), lambda: len(_candidates(central)) == 2)
    with answering(central.journal, roll_back_once):
        make_loop(central, make_settings(quorum=1)).step()
    assert central.head().manifest.version == 0
    assert {update.update_id for update in _waiting(central)} >= set(waiting)
    take_steps(central, make_settings(), lambda: central.head().manifest.version == 1)
    assert len(central.head().manifest.updates) == 4


def _waiting(central: Central) -> list:
    with central.journal.read() as state:
        return state.waiting("shared")


def _candidates(central: Central) -> list[str]:
    with central.journal.read() as state:
        return [plan.candidate for plan in state.plans.values() if plan.candidate]
