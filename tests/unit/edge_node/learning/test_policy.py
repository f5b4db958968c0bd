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
    decision = decide(
        SETTINGS, Signals(examples=examples, new_failures=failures, new_feedback=100, same_start_age_s=None)
    )
    assert (decision.start, decision.warm) == (start, warm)


def test_second_round_from_one_start_needs_a_new_failure_even_without_a_minimum() -> None:
    eager = LearningSettings(min_examples=1, min_new_failures=0)
    assert decide(eager, Signals(examples=1, new_failures=0, new_feedback=100, same_start_age_s=None)).start
    assert not decide(eager, Signals(examples=1, new_failures=0, new_feedback=100, same_start_age_s=3600)).start
    assert decide(eager, Signals(examples=1, new_failures=1, new_feedback=100, same_start_age_s=3600)).start


@pytest.mark.parametrize(("age_s", "start"), [(0, False), (599, False), (600, True)])
def test_second_round_from_one_start_waits_for_the_merge(age_s: float, start: bool) -> None:
    signals = Signals(examples=50, new_failures=50, new_feedback=100, same_start_age_s=age_s)
    assert decide(LearningSettings(min_examples=50, supersede_after_s=600), signals).start is start


@pytest.mark.parametrize(("feedback", "start"), [(79, False), (80, True)])
def test_a_round_waits_for_feedback_on_the_serving_release(feedback: int, start: bool) -> None:
    rehearsing = LearningSettings(min_examples=50, min_new_failures=0, min_new_feedback=80)
    signals = Signals(examples=50, new_failures=0, new_feedback=feedback, same_start_age_s=None)
    assert decide(rehearsing, signals).start is start
