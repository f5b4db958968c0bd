"""The smallest environment: a word goes in, the next word is expected. An ordinary plug-in."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from edge_node.environments import Outcome, Task


class NextWord:
    """`w7` -> `w8`; the two splits use words of their own."""

    def __init__(self, first: int = 0, last: int = 100) -> None:
        self._words = {"train": range(first, last, 2), "held_out": range(first + 1, last, 2)}

    def tasks(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Task]:
        words = self._words[split]
        numbers = random.Random(f"{split}/{seed}").sample(words, len(words))[:count]
        return [
            Task(
                id=f"{split}/{number}",
                messages=[{"role": "user", "content": f"w{number}"}],
                data={"number": number},
            )
            for number in numbers
        ]

    def verify(self, task: Task, answer: str) -> Outcome:
        expected = self.reference_answer(task)
        passed = answer.strip() == expected
        return Outcome(
            passed=passed,
            score=float(passed),
            reason="" if passed else f"answered {answer[:20]!r}",
            correction=None if passed else expected,
        )

    def reference_answer(self, task: Task) -> str:
        return f"w{task.data['number'] + 1}"
