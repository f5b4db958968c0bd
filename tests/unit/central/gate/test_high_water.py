"""Which release an environment's candidates are compared with, after which verdicts."""

from __future__ import annotations

from typing import Any

from central.gate import high_water

EVERY = {"r0", "r1", "r2", "r3"}


def figures(reference: str, better: bool = False) -> dict[str, dict[str, Any]]:
    counts = {"both": 50, "only_reference": 0, "only_candidate": 30 if better else 2, "neither": 20}
    return {"e": {**counts, "reference": reference, "better": better, "standing": "fine"}}


def test_it_moves_to_a_significantly_better_release_only() -> None:
    assert high_water([("r1", figures("r0"))], EVERY) == {"e": "r0"}
    assert high_water([("r1", figures("r0", better=True))], EVERY) == {"e": "r1"}
    verdicts = [("r1", figures("r0", better=True)), ("r2", figures("r1"))]
    assert high_water(verdicts, EVERY) == {"e": "r1"}
    assert high_water([], EVERY) == {}


def test_better_than_another_release_moves_nothing() -> None:
    verdicts = [("r1", figures("r0", better=True)), ("r2", figures("r1"))]
    fallen_back = ("r3", figures("r2", better=True))
    assert high_water([*verdicts, fallen_back], EVERY) == {"e": "r1"}


def test_a_loss_that_an_operator_accepted_is_no_longer_held_against_later_releases() -> None:
    removal = ("r2", {"e": {**figures("r1")["e"], "standing": "fell"}})
    assert high_water([("r1", figures("r0", better=True)), removal], EVERY) == {"e": "r2"}


def test_an_abandoned_release_is_none() -> None:
    first, second = ("r1", figures("r0", better=True)), ("r2", figures("r1"))
    assert high_water([second], EVERY - {"r1"}) == {"e": "r2"}
    assert high_water([first, second], EVERY) == {"e": "r1"}
