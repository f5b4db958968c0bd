"""When a round learns from verifiers."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from edge_node.learning.policy import Decision, Signals, decide
from edge_node.settings import EdgeSettings, EnvironmentSpec, LearningSettings

WORDS = {"name": "words", "factory": "tests.fakes.word_environment:NextWord"}
AUTO = LearningSettings(min_examples=50, min_new_failures=5, supersede_after_s=600)


def signals(**changes: Any) -> Signals:
    nothing: dict[str, Any] = {
        "examples": 0, "new_failures": 0, "new_feedback": 0, "same_start_age_s": None,
        "rollouts": 1,
    }  # fmt: skip
    return Signals(**nothing | changes)


def test_a_node_without_any_feedback_learns_from_its_verifier() -> None:
    assert decide(AUTO, signals()) == Decision(start=True, warm=True, method="grpo")


def test_without_a_verifier_nothing_starts() -> None:
    assert not decide(AUTO, signals(rollouts=0)).start


def test_corrections_come_first() -> None:
    ready = signals(examples=50, new_failures=5, new_feedback=5)
    assert decide(AUTO, ready) == Decision(start=True, warm=True, method="sft")
    few = signals(examples=49, new_failures=5, new_feedback=5)
    assert decide(AUTO, few).method == "grpo"


@pytest.mark.parametrize(("method", "expected"), [("sft", "sft"), ("grpo", "grpo")])
def test_a_method_that_is_set_is_the_only_one(method: Any, expected: str) -> None:
    settings = AUTO.model_copy(update={"method": method})
    both = decide(settings, signals(examples=50, new_failures=5, new_feedback=5))
    assert (both.start, both.method) == (True, expected)
    assert decide(settings, signals()).start is (expected == "grpo")
    no_verifier = signals(rollouts=0, examples=50, new_failures=5, new_feedback=5)
    assert decide(settings, no_verifier).start is (expected == "sft")


def test_a_release_that_was_explored_is_not_explored_again() -> None:
    assert not decide(AUTO, signals(start_is_explored=True, same_start_age_s=10_000)).start


@pytest.mark.parametrize(("age_s", "start"), [(0, False), (599, False), (600, True)])
def test_after_a_round_without_gain_the_next_one_waits(age_s: float, start: bool) -> None:
    assert decide(AUTO, signals(same_start_age_s=age_s)).start is start


def test_after_a_round_without_any_reward_the_next_one_does_not_wait() -> None:
    again = signals(same_start_age_s=1, was_unrewarded=True)
    assert decide(AUTO, again) == Decision(start=True, warm=True, method="grpo")
    explored = signals(start_is_explored=True, same_start_age_s=1, was_unrewarded=True)
    assert not decide(AUTO, explored).start


def test_grpo_needs_a_verifier() -> None:
    with pytest.raises(ValidationError, match="METHOD is grpo, and no environment has rollouts"):
        EdgeSettings.model_validate({"learning": {"method": "grpo"}, "environments": [WORDS]})
    explored = EdgeSettings.model_validate(
        {"learning": {"method": "grpo"}, "environments": [WORDS | {"rollouts": True}]}
    )
    assert explored.learning.grpo.samples == 8


def test_an_anchor_has_no_rollouts() -> None:
    with pytest.raises(ValidationError, match="'words' has anchor and rollouts"):
        EnvironmentSpec.model_validate(WORDS | {"rollouts": True, "anchor": True})


def test_policies_need_room_in_memory() -> None:
    fields: dict[str, Any] = {
        "serving": {"max_cpu_loras": 12}, "releases": {"keep": 8}, "environments": [WORDS],
        "learning": {"gate": {"tasks": 0}},
    }  # fmt: skip
    EdgeSettings.model_validate(fields)
    EdgeSettings.model_validate(fields | {"learning": {}, "environments": []})
    with pytest.raises(ValidationError, match="needs at least 13"):
        EdgeSettings.model_validate(fields | {"learning": {}})
    with pytest.raises(ValidationError, match="needs at least 13"):
        EdgeSettings.model_validate(fields | {"environments": [WORDS | {"rollouts": True}]})
