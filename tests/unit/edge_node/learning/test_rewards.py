from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from edge_node.environments import Outcome, Task
from edge_node.errors import EnvironmentFault
from edge_node.learning.gain import of_scores
from edge_node.learning.rewards import Exercise, Judge, reward, without_variance
from tests.fakes.letters import rules
from tests.fakes.word_environment import NextWord

TASK = Task("t", [{"role": "user", "content": "secret words"}])


class Scorer(NextWord):
    """Gives the answer as its score, or raises it."""

    def verify(self, task: Task, answer: Any) -> Outcome:
        if isinstance(answer, Exception):
            raise answer
        return Outcome(False, answer, "", None)


def exercise() -> Exercise:
    return Exercise("words", Scorer(), TASK, [1, 2], 0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (0.0, 0.0), (0.25, 0.25), (1, 1.0), (None, None), (math.nan, None), (math.inf, None),
        (RuntimeError("secret words"), None), ("not a number", None),
    ],
)  # fmt: skip
def test_a_fault_is_no_bad_mark(
    answer: Any, expected: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert reward(exercise(), answer) == expected
    assert "secret words" not in caplog.text


def test_an_environment_that_hangs_ends_the_judging() -> None:
    raised: Any = EnvironmentFault("words", "it raised", raised=True)
    assert reward(exercise(), raised) is None
    hung: Any = EnvironmentFault("words", "it hung")
    with pytest.raises(EnvironmentFault, match="it hung"):
        reward(exercise(), hung)


@pytest.mark.parametrize(
    ("rewards", "flat"),
    [
        ([0, 0, 1, 1], [True, True]), ([0, 1, 1, 1], [False, True]),
        ([0, 1, 0, 1], [False, False]), ([None, 1, 0, 1], [True, False]),
        ([None, None, None, 1], [True, True]), ([0.3, 0.3 + 1e-9, 0, 0.1], [True, False]),
    ],
)  # fmt: skip
def test_groups_that_teach_nothing(rewards: list[float | None], flat: list[bool]) -> None:
    assert without_variance(rewards, 2) == flat


def test_the_judge_counts_for_the_round() -> None:
    counted: dict[str, float] = {}
    beats: list[int] = []
    judge = Judge([exercise(), exercise()], samples=2, beat=lambda: beats.append(0))
    answers: Any = [0.0, 1.0, None, 0.5]
    given = judge(["0", "0", "1", "1"], answers, [None] * 4, counted.__setitem__)
    assert given == [0.0, 1.0, None, 0.5]
    assert counted == {"groups_skipped": 1, "unscored": 1}
    assert judge.teaches == [True, True, False, False]
    assert len(beats) == 4, "a slow verifier is no learner that hangs"


def test_an_episode_was_judged_when_it_ended() -> None:
    played = replace(exercise(), rules=rules())
    judge = Judge([exercise(), played], samples=2)
    texts: Any = [1.0, 0.0, None, None]
    rewards = judge(["0", "0", "1", "1"], texts, [None, None, 0.25, None], lambda *_: None)
    assert rewards == [1.0, 0.0, 0.25, None]


def test_an_episode_whose_environment_raises_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def fault(raised: bool) -> Exercise:
        class Faulty:
            schemas: Sequence[dict[str, Any]] = ()

            def tasks(self, split: Any, *, count: int, seed: int) -> list[Task]:
                return []

            def start(self, task: Task) -> Any:
                raise EnvironmentFault("words", "secret words", raised=raised)

        return Exercise("words", Faulty(), TASK, [1, 2], 0, rules())

    async def sample(ids: Any, most: int, turn: int) -> Any:
        raise AssertionError

    assert asyncio.run(fault(True).play(sample)) is None
    assert "a verifier raised" in caplog.text
    assert "secret words" not in caplog.text
    with pytest.raises(EnvironmentFault):
        asyncio.run(fault(False).play(sample))


def test_a_gain_is_paired() -> None:
    gain = of_scores(start=[0, 1, 0, 0.5], policy=[1, 0, 1, 0.5])
    assert gain.is_one
    assert gain.metrics() == {
        "held_out_tasks": 4, "held_out_better": 2, "held_out_worse": 1, "held_out_start": 0.375,
        "held_out_policy": 0.625,
    }  # fmt: skip
    assert not of_scores([0.5], [0.5]).is_one
    assert of_scores([None, 0, 1], [1, 0.5, None]) == of_scores([0], [0.5])
    assert not of_scores([1, 1], [1, 0]).is_one
