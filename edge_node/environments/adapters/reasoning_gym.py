"""A data set of reasoning-gym (https://github.com/open-thought/reasoning-gym) as an environment.

In: the name of a data set, its configuration, a seed. Out: its questions as tasks; its own
`score_answer` as the verdict. Guarantees: a question's hash decides its split, so no text is in
both. Needs the package reasoning-gym (`lorikeet-federated[reasoning-gym]`).
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from edge_node.environments.contract import Outcome, Split, Task

PASSES = 1 - 1e-9
CHUNK = 500
"""Questions of one generated data set; the next ones come from another seed."""
DRY_CHUNKS = 4
"""A data set that gives no new question in so many chunks has no more."""
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Extract = Literal["whole", "last-number"]


class ReasoningGym:
    """One data set; every node with the same options has the same tasks."""

    def __init__(
        self,
        dataset: str,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        extract: Extract = "whole",
    ) -> None:
        """Find the data set.

        Args:
            dataset: a name that reasoning-gym knows, e.g. `chain_sum`.
            config: fields of its configuration, but for `seed` and `size`.
            seed: another one gives other questions.
            extract: what of an answer is scored: all of it, stripped; or its last number.

        Raises:
            ModuleNotFoundError: reasoning-gym is not installed.
            ValueError: no such data set, or a configuration that it does not take.
        """
        if extract not in get_args(Extract):
            raise ValueError(f"extract is {extract!r}; expected {' or '.join(get_args(Extract))}")
        self._config = dict(config or {})
        if taken := sorted({"seed", "size"} & self._config.keys()):
            raise ValueError(f"config has {', '.join(taken)}; expected the option `seed` instead")
        try:
            self._create = importlib.import_module("reasoning_gym").create_dataset
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the package {error.name} is not installed; expected what `pip install "
                "'lorikeet-federated[reasoning-gym]'` installs"
            ) from error
        self._dataset = dataset
        self._seed = seed
        self._extract = extract
        self._scorer = self._chunk("train", 0, 0)

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` questions with distinct texts, fewer where the data set has no more."""
        found: dict[str, Task] = {}
        for entry in self._entries(split, seed, found):
            if len(found) == count:
                break
            question = str(entry["question"])
            digest = hashlib.sha256(question.encode()).hexdigest()
            if (int(digest[-1], 16) % 2 == 0) == (split == "train"):
                messages = [{"role": "user", "content": question}]
                task = Task(f"{self._dataset}-{digest[:16]}", messages, {"entry": entry})
                found.setdefault(question, task)
        return list(found.values())

    def verify(self, task: Task, answer: str) -> Outcome:
        """The data set's score of the extracted answer, held to 0..1."""
        entry = task.data["entry"]
        try:
            score = float(self._scorer.score_answer(self._extracted(answer), entry))
        except Exception as error:  # some data sets raise for an answer that they cannot read
            return self._outcome(0.0, f"it cannot be scored ({type(error).__name__})", task)
        score = min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
        return self._outcome(score, f"it scores {score:.3g}; expected 1", task)

    def reference_answer(self, task: Task) -> str | None:
        """The data set's own answer, where it has one."""
        answer = task.data["entry"]["answer"]
        return answer if isinstance(answer, str) else None

    def _outcome(self, score: float, reason: str, task: Task) -> Outcome:
        if score >= PASSES:
            return Outcome(passed=True, score=score, reason="", correction=None)
        return Outcome(False, score, reason, self.reference_answer(task))

    def _extracted(self, answer: str) -> str:
        if self._extract == "whole":
            return answer.strip()
        numbers = NUMBER.findall(answer)
        return numbers[-1].replace(",", "") if numbers else ""

    def _entries(self, split: Split, seed: int, found: Mapping[str, Task]) -> Iterator[Any]:
        """Questions without end, until `found` does not grow any more."""
        number = dry = 0
        while dry < DRY_CHUNKS:
            before = len(found)
            chunk = self._chunk(split, seed, number)
            yield from (chunk[index] for index in range(CHUNK))
            dry = dry + 1 if len(found) == before else 0
            number += 1

    def _chunk(self, split: Split, seed: int, number: int) -> Any:
        text = f"{self._dataset}/{self._seed}/{split}/{seed}/{number}"
        drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2
        try:
            return self._create(self._dataset, seed=drawn, size=CHUNK, **self._config)
        except (TypeError, AssertionError) as error:  # how its configurations refuse a field
            raise ValueError(
                f"reasoning-gym's {self._dataset} does not take config {self._config!r}: {error}"
            ) from error
