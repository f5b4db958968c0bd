"""Candidates that pass every task, judged by the likelihood of texts, on a real journal."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from central.gate import Differences
from central.journal import EvaluationRecord, Suite
from protos.manifest import sha256_hex
from tests.contract.cohort_loop import (
    Central,
    Reply,
    answering_offers,
    make_increment,
    make_settings,
    opened,
    take_steps,
)
from tests.contract.looks import SAME, decide, measured, offers, settings, waiting

Value = Callable[[random.Random], float]
"""Difference of one document: candidate less reference, nats a token."""


TEXT_DECIDES = settings(max_tasks=6400, tolerance_points=90)
"""The tasks are fine at the first look."""


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    with opened(tmp_path) as central:
        yield central


def texts(offer: EvaluationRecord, node: str, value: Value, number: int) -> dict[str, object]:
    """What a node with `number` documents reports of those that are asked for."""
    suite = offer.suite("text")
    assert suite is not None
    count = max(min(suite.tasks, number - suite.first_task), 0)
    rng = random.Random(f"{node} {suite.first_task}")
    values = [value(rng) for _ in range(count)]
    found = {
        **measured(offer, node, "text", (0, 0, 0, 0)),
        "anchor": True,
        "both_passed": 0,
        "tasks_digest": sha256_hex(f"texts {node} {suite.first_task}".encode()),
    }
    if values:
        total = sum(values)
        squares = sum(value * value for value in values)
        found["likelihood"] = vars(
            Differences(count, 20 * count, -3.0, -3.0 + total / count, total, squares)
        )
    return found


def nodes_with(value: Value, documents: int = 40) -> Callable[[EvaluationRecord, str], Reply]:
    """Every node passes its tasks and measures documents of its own."""

    def answer(offer: EvaluationRecord, node: str) -> Reply:
        found = [measured(offer, node, "tasks", SAME)] if offer.suite("tasks") else []
        if offer.suite("text"):
            found.append(texts(offer, node, value, documents))
        return found, ""

    return answer


def ruined(rng: random.Random) -> float:
    return rng.gauss(-0.5, 0.2)


def harmless(rng: random.Random) -> float:
    return rng.gauss(-0.005, 0.02)


def vague(rng: random.Random) -> float:
    return rng.gauss(0.0, 1.0)


def test_a_candidate_that_ruins_the_texts_is_rejected_though_all_tasks_pass(
    central: Central,
) -> None:
    central.join("shared", "a-1", "b-2")
    text = decide(central, nodes_with(ruined))
    assert text.startswith("rejected: text fell. tasks: 32 -> 32 of 40")
    assert ". anchor text: -3.000 -> -3.5" in text
    assert "nats a token over 40 documents (p " in text
    assert central.head().manifest.version == 0
    central.journal.verify()


def test_a_harmless_candidate_is_released(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    text = decide(central, nodes_with(harmless), TEXT_DECIDES)
    assert text.startswith("accepted: no environment fell. ")
    assert ". anchor text: -3.000 -> -3.0" in text
    assert "tolerance 0.05 nats, 2 nodes), fine" in text
    with central.journal.read() as state:
        verdict = state.releases[central.head().release_id].verdict
    assert verdict is not None
    assert verdict.environments["text"]["likelihood"]["documents"] == 40
    assert len(offers(central)) == 1


def test_what_is_undecided_is_asked_other_documents_until_there_are_none(central: Central) -> None:
    central.join("shared", "a-1", "b-2")
    text = decide(central, nodes_with(vague, documents=50), TEXT_DECIDES)
    suites = [offer.suites.get("text") for offer in offers(central)]
    assert suites == [None, Suite(20, 20), Suite(40, 40)]
    assert "over 100 documents" in text
    assert "Too few tasks to be sure of text" in text


def test_the_search_finds_the_update_that_ruins_the_texts(central: Central) -> None:
    central.join("shared", "a-1", "b-2", "c-3")
    ids = [
        central.admit(node, make_increment(seed, rank=1))
        for seed, node in enumerate(("a-1", "b-2", "c-3"))
    ]

    def answer(offer: EvaluationRecord, node: str) -> Reply:
        with central.journal.read() as state:
            line = state.lineage(offer.candidate)
            hurts = any(ids[1] in release.manifest.updates for release in line)
        return nodes_with(ruined if hurts else harmless)(offer, node)

    with answering_offers(central.journal, answer):
        for until in (lambda: len(offers(central)) > 3, lambda: not waiting(central)):
            take_steps(central, make_settings(quorum=1, min_updates=3), until)
    with central.journal.read() as state:
        states = [state.updates[update].state for update in ids]
    assert states == ["merged", "set_aside", "merged"]
