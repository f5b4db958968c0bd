from __future__ import annotations

import pytest

from edge_node.learning.policy import Signals, decide
from edge_node.settings import LearningSettings

SETTINGS = LearningSettings(min_examples=50, min_new_failures=5)


@pytest.mark.parametrize(
    ("examples", "failures", "start", "warm"),
    [
        (24, 24, False, False),
        (25, 24, False, True),
        (49, 49, False, True),
        (50, 5, True, True),
        (50, 4, False, True),
    ],
)
def test_round_needs_examples_and_new_failures(examples: int, failures: int, start: bool, warm: bool) -> None:
    decision = decide(SETTINGS, Signals(examples=examples, new_failures=failures, same_start=False))
    assert (decision.start, decision.warm) == (start, warm)


def test_second_round_from_one_start_needs_a_new_failure_even_without_a_minimum() -> None:
    eager = LearningSettings(min_examples=1, min_new_failures=0)
    assert decide(eager, Signals(examples=1, new_failures=0, same_start=False)).start
    assert not decide(eager, Signals(examples=1, new_failures=0, same_start=True)).start
    assert decide(eager, Signals(examples=1, new_failures=1, same_start=True)).start
