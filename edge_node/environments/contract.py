"""What an environment plug-in provides. It needs no import of ours: any object with these methods will do.

In: a split, a count and a seed; an answer to a task. Out: tasks; outcomes. An environment promises that the same
arguments give the same tasks, that `train` and `held_out` never share a text, and that `verify` never raises for an
answer, however broken it is: what is wrong with it is the outcome's `reason`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Task:
    """A request as a client would send it; `data` is what the verifier needs and no client sees."""

    id: str
    messages: list[dict[str, str]]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Verdict on one answer: `score` in 0..1; `correction` is a right answer where the environment knows one."""

    passed: bool
    score: float
    reason: str
    correction: str | None


@runtime_checkable
class Environment(Protocol):
    """Work at a customer."""

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` distinct tasks, or as many as there are; the same ones for the same arguments. Those for a larger count
        begin with those for a smaller one: a candidate that is undecided is asked the ones after them."""

    def verify(self, task: Task, answer: str) -> Outcome:
        """Judge `answer`; never raises for a bad one."""

    def reference_answer(self, task: Task) -> str | None:
        """A right answer, where one is known; anchors need it."""
