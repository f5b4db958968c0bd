"""How far a merge has come, for the log and for operators.

In: the steps of a merge, from the thread that merges. Out: words, for any thread that asks; a log
record every LOG_EVERY_S seconds at most. Guarantees: it lives in memory alone; a step never waits
for a reader; a merge that ends, also by an error, is gone from the list.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger(__name__)

LOG_EVERY_S = 10.0
"""Seconds between two lines in the log."""


@dataclass(frozen=True)
class Stage:
    """A part of a merge: it reads payloads and adds them up, then it cuts modules."""

    verb: str
    noun: str
    done: int
    total: int
    begun: float
    """Of time.monotonic, in seconds."""

    def words(self, now: float) -> str:
        """For example "61 of 210 modules merged, 40 s left"; the time is that of this stage."""
        text = f"{self.done} of {self.total} {self.noun} {self.verb}"
        if not 0 < self.done < self.total:
            return text
        left = (now - self.begun) / self.done * (self.total - self.done)
        return f"{text}, {left:.0f} s left"


class Progress:
    """One merge under way. One thread writes, any thread reads: each step is one assignment."""

    def __init__(self, cohort: str, payloads: int) -> None:
        self.cohort = cohort
        self._payloads = payloads
        self._logged = time.monotonic()
        self.read()

    def read(self) -> None:
        """A sum begins: payloads are read and added up."""
        self._stage = Stage("read", "payloads", 0, self._payloads, time.monotonic())

    def cut(self, modules: int) -> None:
        """Everything is added up: so many modules are cut to the rank."""
        self._stage = Stage("merged", "modules", 0, modules, time.monotonic())

    def step(self) -> None:
        """One payload or one module more."""
        at, now = self._stage, time.monotonic()
        total = max(at.total, at.done + 1)  # a replay reads more than its plan names
        self._stage = Stage(at.verb, at.noun, at.done + 1, total, at.begun)
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("merging", extra={"cohort": self.cohort, "progress": str(self)})

    def __str__(self) -> str:
        return self._stage.words(time.monotonic())


_under_way: list[Progress] = []
_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def shown(cohort: str, payloads: int) -> Iterator[None]:
    """Inside the block, sums belong to the cohort's merge of so many payloads."""
    progress = Progress(cohort, payloads)
    token = _current.set(progress)
    _under_way.append(progress)
    try:
        yield
    finally:
        _under_way.remove(progress)
        _current.reset(token)


def current() -> Progress:
    """The progress of the merge that the caller belongs to; outside `shown` nobody lists it."""
    return _current.get() or Progress("", 0)


def under_way() -> list[Progress]:
    """The merges of this process now, oldest first."""
    return list(_under_way)
