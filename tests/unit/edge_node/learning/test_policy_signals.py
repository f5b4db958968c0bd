"""Which method the signals decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_node.experience import ExperienceStore
from edge_node.learning.feedback_plan import GroupSizes
from edge_node.learning.policy import Method, Signals, decide
from edge_node.learning.signals import group_sizes
from edge_node.settings import LearningSettings

SETTINGS = LearningSettings(min_examples=10, min_new_failures=5)
CORRECTED = {"examples": 10, "new_failures": 5, "new_feedback": 5, "new_corrections": 1}
VERIFIED = {"examples": 10, "new_failures": 5, "new_feedback": 5}
PREFERRED = {"preferences": 10, "new_preferences": 5}
SCORED = {"groups": 10, "new_groups": 5}
THUMBS = {"liked": 4, "disliked": 6, "new_dislikes": 5}
VERIFIER = {"rollouts": 1}


def signals(*parts: dict[str, int], **more: Any) -> Signals:
    nothing = {"examples": 0, "new_failures": 0, "new_feedback": 0, "same_start_age_s": None}
    known: dict[str, Any] = nothing
    for part in parts:
        known = known | part
    return Signals(**known | more)


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        ((CORRECTED, PREFERRED, SCORED, THUMBS, VERIFIER), "sft"),
        ((VERIFIED, PREFERRED, SCORED, THUMBS, VERIFIER), "dpo"),
        ((VERIFIED, SCORED, THUMBS, VERIFIER), "scored"),
        ((VERIFIED, THUMBS, VERIFIER), "kto"),
        ((VERIFIED, VERIFIER), "sft"),
        ((VERIFIER,), "grpo"),
    ],
)
def test_the_richest_signal_decides(parts: tuple[dict[str, int], ...], method: Method) -> None:
    decision = decide(SETTINGS, signals(*parts))
    assert (decision.start, decision.method) == (True, method)


@pytest.mark.parametrize("method", ["sft", "dpo", "scored", "kto"])
def test_a_setting_names_the_only_method(method: Method) -> None:
    wanted = LearningSettings(method=method, min_examples=10)
    every = (CORRECTED, PREFERRED, SCORED, THUMBS, VERIFIER)
    assert decide(wanted, signals(*every)).method == method
    own = {"sft": CORRECTED, "dpo": PREFERRED, "scored": SCORED, "kto": THUMBS}[method]
    others = [part for part in every if part is not own]
    assert not decide(wanted, signals(*others)).start


@pytest.mark.parametrize(
    "part",
    [
        PREFERRED | {"preferences": 9},
        PREFERRED | {"new_preferences": 4},
        SCORED | {"groups": 9},
        SCORED | {"new_groups": 4},
        THUMBS | {"disliked": 5},
        THUMBS | {"new_dislikes": 4},
        THUMBS | {"liked": 0, "disliked": 10},
        THUMBS | {"liked": 10, "disliked": 0},
    ],
    ids=str,
)
def test_a_round_needs_enough_and_something_new(part: dict[str, int]) -> None:
    decision = decide(SETTINGS, signals(part))
    assert (decision.start, decision.warm) == (False, True)


@pytest.mark.parametrize(
    ("part", "method"), [(PREFERRED, "dpo"), (SCORED, "scored"), (THUMBS, "kto")]
)
def test_an_update_of_a_richer_signal_is_not_superseded(
    part: dict[str, int], method: Method
) -> None:
    again = {"same_start_age_s": 600}
    assert decide(SETTINGS, signals(part, **again, sent={method})).method == method
    assert decide(SETTINGS, signals(part, **again, sent={"grpo"})).method == method
    assert not decide(SETTINGS, signals(part, **again, sent={"sft", method})).start
    assert not decide(SETTINGS, signals(part, same_start_age_s=599)).start


@pytest.mark.parametrize("method", ["dpo", "scored", "kto"])
def test_answers_known_to_be_right_supersede_no_richer_update(method: Method) -> None:
    """Of the dislikes that a kto round learnt from, each is also a failure."""
    again = {"same_start_age_s": 600}
    assert not decide(SETTINGS, signals(VERIFIED, **again, sent={method})).start
    assert decide(SETTINGS, signals(CORRECTED, **again, sent={method})).method == "sft"
    assert decide(SETTINGS, signals(VERIFIED, **again, sent={"sft", "grpo"})).method == "sft"


def test_sizes_of_groups_that_were_deleted_meanwhile(tmp_path: Path) -> None:
    """The round that is planned on them is given up; the learner goes on."""
    store = ExperienceStore(tmp_path / "experience.db")
    assert group_sizes(store, 3, 0, "m@v1", 9) == GroupSizes(count=0, samples=2, tokens=1, stale=0)
