from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_node.learning.policy import NothingToLearnFrom, Signals, decide, method_for
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
def test_round_needs_examples_and_new_failures(
    examples: int, failures: int, start: bool, warm: bool
) -> None:
    decision = decide(
        SETTINGS,
        Signals(examples=examples, new_failures=failures, new_feedback=100, same_start_age_s=None),
    )
    assert (decision.start, decision.warm) == (start, warm)


def test_second_round_from_one_start_needs_a_new_failure_even_without_a_minimum() -> None:
    eager = LearningSettings(min_examples=1, min_new_failures=0)
    assert decide(
        eager, Signals(examples=1, new_failures=0, new_feedback=100, same_start_age_s=None)
    ).start
    assert not decide(
        eager, Signals(examples=1, new_failures=0, new_feedback=100, same_start_age_s=3600)
    ).start
    assert decide(
        eager, Signals(examples=1, new_failures=1, new_feedback=100, same_start_age_s=3600)
    ).start


@pytest.mark.parametrize(("age_s", "start"), [(0, False), (599, False), (600, True)])
def test_second_round_from_one_start_waits_for_the_merge(age_s: float, start: bool) -> None:
    signals = Signals(examples=50, new_failures=50, new_feedback=100, same_start_age_s=age_s)
    assert decide(LearningSettings(min_examples=50, supersede_after_s=600), signals).start is start


@pytest.mark.parametrize(("feedback", "start"), [(79, False), (80, True)])
def test_a_round_waits_for_feedback_on_the_serving_release(feedback: int, start: bool) -> None:
    rehearsing = LearningSettings(min_examples=50, min_new_failures=0, min_new_feedback=80)
    signals = Signals(examples=50, new_failures=0, new_feedback=feedback, same_start_age_s=None)
    assert decide(rehearsing, signals).start is start


@pytest.mark.parametrize(
    ("setting", "asked", "examples", "rollouts", "method"),
    [
        ("auto", None, 1, 0, "sft"),
        ("auto", None, 49, 1, "grpo"),
        ("auto", None, 50, 1, "sft"),
        ("auto", "sft", 1, 1, "sft"),
        ("auto", "grpo", 99, 1, "grpo"),
        ("sft", None, 1, 1, "sft"),
        ("grpo", None, 99, 1, "grpo"),
    ],
)
def test_an_operators_round_needs_no_more_than_something_to_learn_from(
    setting: Any, asked: Any, examples: int, rollouts: int, method: str
) -> None:
    settings = LearningSettings(method=setting, min_examples=50)
    assert method_for(settings, asked, held(examples=examples, rollouts=rollouts)) == method


@pytest.mark.parametrize(
    ("counts", "method"),
    [
        ({"preferences": 3}, "dpo"),
        ({"groups": 2, "liked": 9, "disliked": 9}, "scored"),
        ({"liked": 1, "disliked": 1}, "kto"),
        ({"preferences": 3, "liked": 40, "disliked": 10}, "kto"),
        ({"examples": 1, "preferences": 50}, "dpo"),
    ],
)
def test_an_operators_round_learns_from_the_richest_signal_that_there_is_enough_of(
    counts: Any, method: str
) -> None:
    assert method_for(LearningSettings(min_examples=50), None, held(**counts)) == method


@pytest.mark.parametrize(
    ("setting", "asked", "examples", "rollouts", "misfit", "words"),
    [
        ("auto", None, 0, 0, "", "from by sft: it holds 0 corrected or verified answers"),
        ("auto", "grpo", 0, 0, "", "from by grpo: no environment has rollouts"),
        ("auto", "kto", 0, 0, "", "from by kto: it holds 0 liked and 0 disliked answers"),
        ("auto", "sft", 0, 1, "", "from by sft: it holds 0 corrected or verified answers"),
        ("auto", "grpo", 9, 1, "Rank 9 is too large.", "by grpo: Rank 9 is too large."),
        ("sft", "grpo", 9, 1, "", "EDGE_LEARNING__METHOD is sft, and a round by grpo"),
        ("grpo", "sft", 9, 1, "", "EDGE_LEARNING__METHOD is grpo, and a round by sft"),
        ("sft", None, 0, 1, "", "by sft: it holds 0"),
    ],
)
def test_an_operators_round_without_anything_to_learn_from_is_refused(
    setting: Any, asked: Any, examples: int, rollouts: int, misfit: str, words: str
) -> None:
    settings = LearningSettings(method=setting)
    with pytest.raises(NothingToLearnFrom, match=words):
        method_for(settings, asked, held(examples=examples, rollouts=rollouts), misfit)


def held(**counts: int) -> Signals:
    return replace(
        Signals(examples=0, new_failures=0, new_feedback=0, same_start_age_s=None), **counts
    )
