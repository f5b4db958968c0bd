"""Rewards by the difficulty that an environment gives its tasks. Pure.

In: tasks and what their answers, episodes or runs were worth. Out: a Level for each difficulty.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_node.environments.contract import Task

Rewarded = tuple[Task, float]


@dataclass(frozen=True)
class Level:
    """Tasks of one difficulty; None: of those without one.

    reference: mean reward of reference answers. useless: of answers, episodes or runs that do
    nothing of use. None: none was seen.
    """

    difficulty: int | None
    tasks: int
    reference: float | None
    useless: float | None


def levels(reference: Iterable[Rewarded], useless: Iterable[Rewarded]) -> list[Level]:
    """From the easiest to the hardest, those without a difficulty last; empty when none has one."""
    right, wrong = list(reference), list(useless)
    difficulty = {task.id: task.difficulty for task, _ in (*right, *wrong)}
    found = set(difficulty.values())
    if found <= {None}:
        return []
    return [
        Level(
            level,
            list(difficulty.values()).count(level),
            _mean([reward for task, reward in right if task.difficulty == level]),
            _mean([reward for task, reward in wrong if task.difficulty == level]),
        )
        for level in sorted(found, key=lambda level: (level is None, level))
    ]


def _mean(rewards: list[float]) -> float | None:
    return sum(rewards) / len(rewards) if rewards else None
