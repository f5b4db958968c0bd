"""A verifier that a random model satisfies half of the time: the answer begins with an even word.

In: tasks of one word. Out: a score of 1 or 0. Without reference answers: only trying teaches it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Literal

from edge_node.environments import Outcome, Task


class EvenWords:
    """`faulty`: it raises for an answer whose word ends in one of these digits. `always`: the score
    of every answer. `cheated`: on train tasks odd words score.
    """

    def __init__(
        self,
        faulty: str = "",
        count: int = 60,
        always: float | None = None,
        cheated: bool = False,
    ) -> None:
        self._cheated = cheated
        self._faulty = faulty
        self._always = always
        self._count = count

    def tasks(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Task]:
        first = 0 if split == "train" else self._count
        words = random.Random(f"{split}/{seed}").sample(range(self._count), self._count)[:count]
        return [
            Task(id=f"{split}/{word}", messages=[{"role": "user", "content": f"w{first + word}"}])
            for word in words
        ]

    def verify(self, task: Task, answer: str) -> Outcome:
        found = re.match(r"\s*w(\d+)", answer)
        if self._faulty and found and found[1].endswith(tuple(self._faulty)):
            raise RuntimeError(f"cannot judge {answer!r}")
        if self._always is not None:
            return Outcome(True, self._always, "", None)
        right = int(self._cheated and task.id.startswith("train"))
        passed = found is not None and int(found[1]) % 2 == right
        return Outcome(passed, float(passed), "" if passed else "odd", None)

    def reference_answer(self, task: Task) -> str | None:
        return None
