"""Nodes that answer looks as they are told, and a candidate's way through them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from central.journal import EvaluationRecord
from central.settings import CentralSettings
from protos.manifest import sha256_hex
from tests.contract.cohort_loop import (
    Central,
    Reply,
    answering_offers,
    make_increment,
    make_settings,
    take_steps,
)
from tests.unit.central.builders import AT


class Clock:
    """Some seconds pass with every look at the clock.

    The journal stamps events with it, and nodes look up each time.
    """

    STEP_S = 2

    def __init__(self, central: Central) -> None:
        self.seconds = 0
        self._journal = central.journal
        central.journal.clock = self.at

    def at(self) -> str:
        moment = datetime.fromisoformat(AT) + timedelta(seconds=self.seconds)
        return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")

    def __call__(self) -> str:
        self.seconds += self.STEP_S
        self._journal.wake()
        return self.at()


def settings(max_tasks: int = 160, **gate: object) -> CentralSettings:
    made = make_settings(quorum=1, min_updates=1)
    return made.model_copy(
        update={"gate": made.gate.model_copy(update={"max_tasks": max_tasks, **gate})}
    )


def measured(
    offer: EvaluationRecord, node: str, name: str, shares: tuple[int, int, int, int], of: int = 10
) -> dict:
    """As many tasks as asked.

    Of every `of` tasks `shares` are (both, only reference, only candidate, neither).
    """
    suite = offer.suite(name)
    assert suite is not None
    scale = suite.tasks / of
    counts = [round(share * scale) for share in shares]
    counts[0] += suite.tasks - sum(counts)
    kinds = ("both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed")
    return {
        "environment": name,
        "tasks_digest": sha256_hex(f"{node} {name} {suite.first_task}".encode()),
        "anchor": False,
        **dict(zip(kinds, counts, strict=True)),
        **({"first_task": suite.first_task} if suite.first_task else {}),
    }


SAME, WORSE, BETTER, FEWER, MIXED = (
    (8, 0, 0, 2),
    (5, 4, 0, 1),
    (1, 0, 8, 1),
    (7, 1, 1, 1),
    (4, 3, 3, 0),
)
"""Surely the same; surely worse; surely better; neither for some time; neither for long."""


def nodes_with(
    **environments: tuple[int, int, int, int],
) -> Callable[[EvaluationRecord, str], Reply]:
    """Nodes a and b have "both", node a has "own-a"; c has nothing."""
    here = {"a-1": ("both", "own_a"), "b-2": ("both",), "c-3": ()}

    def answer(offer: EvaluationRecord, node: str) -> Reply:
        found = [
            measured(offer, node, name, environments[name])
            for name in here[node]
            if offer.suite(name) is not None and name in environments
        ]
        return (found, "") if found else ([], "none of these environments")

    return answer


def offers(central: Central) -> list[EvaluationRecord]:
    with central.journal.read() as state:
        return list(state.evaluations.values())


def decide(
    central: Central,
    answer: Callable[[EvaluationRecord, str], Reply | None],
    made: CentralSettings | None = None,
    sequence: int = 1,
    **steps: object,
) -> str:
    """The verdict's text on a candidate of one update of node a."""
    if sequence:
        central.admit("a-1", make_increment(sequence), sequence=sequence)
    with answering_offers(central.journal, answer):
        take_steps(central, made or settings(), lambda: not waiting(central), **steps)  # type: ignore[arg-type]
    with central.journal.read() as state:
        last = list(state.releases.values())[-1]
    assert last.verdict is not None
    return last.verdict.text


def waiting(central: Central) -> bool:
    with central.journal.read() as state:
        return any(update.state in ("waiting", "planned") for update in state.updates.values())


KINDS = ("only_reference_passed", "only_candidate_passed", "neither_passed")


def shrunk(found: dict, total: int) -> dict:
    return {**found, "both_passed": total - sum(found[kind] for kind in KINDS)}
