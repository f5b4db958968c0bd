"""An environment that knows one right answer to each task: what some model says to it.

In: the path of a JSON object, word -> answer. Out: held-out tasks of these words; any other answer
is wrong.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from edge_node.environments import Outcome, Task


class KnownAnswers:
    """`raises`: the verifier does, for every answer."""

    def __init__(self, path: str, raises: bool = False) -> None:
        self._answers: dict[str, str] = json.loads(Path(path).read_text())
        self._raises = raises

    def tasks(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Task]:
        words = sorted(self._answers) if split == "held_out" else ["w0"]
        chosen = random.Random(seed).sample(words, len(words))[:count]
        return [Task(word, [{"role": "user", "content": word}]) for word in chosen]

    def verify(self, task: Task, answer: str) -> Outcome:
        if self._raises:
            raise RuntimeError(f"cannot judge {answer!r}")
        passed = answer.strip() == self._answers[task.id]
        return Outcome(passed, float(passed), "" if passed else "another answer", None)

    def reference_answer(self, task: Task) -> str | None:
        return self._answers.get(task.id)
