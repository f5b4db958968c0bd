"""A verifier that no random model satisfies: the answer is two words that nobody guesses.

In: tasks of one word. Out: a score of 1 or 0. `known`: whether it knows the right answer; `wrong`:
whether what it knows is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edge_node.environments import Outcome, Task
from tests.fakes.even_words import EvenWords

RIGHT = "w7 w8"


class HiddenWords:
    def __init__(self, known: bool = True, wrong: bool = False) -> None:
        self._words = EvenWords()
        self._reference = None if not known else "w8 w7" if wrong else RIGHT

    def tasks(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Task]:
        return self._words.tasks(split, count=count, seed=seed)

    def verify(self, task: Task, answer: str) -> Outcome:
        passed = answer.strip() == RIGHT
        return Outcome(passed, float(passed), "" if passed else "not these words", None)

    def reference_answer(self, task: Task) -> str | None:
        return self._reference
