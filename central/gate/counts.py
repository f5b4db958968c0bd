"""Paired counts of an environment's tasks.

In: the fields of lorikeet.releases.v1.EnvironmentResult. Out: PairedCounts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, ClassVar

from central.gate.paired_tests import mcnemar, non_inferiority


@dataclass(frozen=True)
class Outcomes:
    """Candidate and reference on the same tasks. The four counts sum to the number of tasks."""

    both: int
    only_reference: int
    only_candidate: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_reference + self.only_candidate + self.neither

    @property
    def fall(self) -> float:
        """The reference's pass rate minus the candidate's, as a fraction. A gain is negative."""
        return (self.only_reference - self.only_candidate) / self.total

    def p_fall(self) -> float:
        """p-value of "no more was lost than gained": small after a loss."""
        return mcnemar(self.only_reference, self.only_candidate)

    def p_fine(self, margin: float) -> float:
        """p-value of "the loss is at least `margin`": small when surely less."""
        return non_inferiority(self.only_reference, self.only_candidate, self.total, margin)

    def p_gain(self) -> float:
        """p-value of "no more was gained than lost": small after a gain."""
        return mcnemar(self.only_candidate, self.only_reference)

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(
            self.both + other.both,
            self.only_reference + other.only_reference,
            self.only_candidate + other.only_candidate,
            self.neither + other.neither,
        )


@dataclass(frozen=True)
class PairedCounts:
    """One environment's outcomes: of first answers (pass^1), and of all attempts (pass^k)."""

    environment: str
    anchor: bool
    both: int
    only_reference: int
    only_candidate: int
    neither: int
    nodes: int = 1
    attempts: int = 1
    every_attempt: Outcomes | None = None
    """Here a task passed when every attempt passed. None when there is one attempt."""
    unit: ClassVar[str] = "points"
    scale: ClassVar[float] = 100.0
    digits: ClassVar[int] = 3

    @property
    def first(self) -> Outcomes:
        """Outcomes of the first answers."""
        return Outcomes(self.both, self.only_reference, self.only_candidate, self.neither)

    @property
    def total(self) -> int:
        return self.first.total

    @property
    def measures(self) -> tuple[Outcomes, ...]:
        """What is tested: the first answers, and all attempts where there are several."""
        return (self.first,) if self.every_attempt is None else (self.first, self.every_attempt)

    @staticmethod
    def read(result: Mapping[str, Any]) -> PairedCounts:
        """Of one node."""
        every = result.get("every_attempt")
        return PairedCounts(
            str(result["environment"]),
            bool(result["anchor"]),
            **_outcomes(result),
            attempts=max(1, int(result.get("attempts", 1))),
            every_attempt=None if every is None else Outcomes(**_outcomes(every)),
        )

    @staticmethod
    def order(item: PairedCounts) -> tuple[float, ...]:
        """Sorts what several nodes say of the same tasks, the largest fall last."""
        return (item.only_reference - item.only_candidate, item.only_reference, item.both)

    @staticmethod
    def join(spoken: Sequence[PairedCounts], anchor: bool, nodes: int) -> PairedCounts:
        """Of one environment, each of other tasks."""
        every = [item.every_attempt for item in spoken if item.every_attempt is not None]
        alike = len(every) == len(spoken) and len({item.attempts for item in spoken}) == 1
        return PairedCounts(
            spoken[0].environment,
            anchor,
            **asdict(reduce(Outcomes.__add__, (item.first for item in spoken))),
            nodes=nodes,
            attempts=spoken[0].attempts if alike else 1,
            every_attempt=reduce(Outcomes.__add__, every) if alike else None,
        )

    def to_json(self) -> dict[str, Any]:
        """As stored in the verdict event; `every_attempt` only where there are several."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {**fields, "total": self.total}


def _outcomes(fields: Mapping[str, Any]) -> dict[str, int]:
    return {
        name: int(fields[f"{name}_passed"])
        for name in ("both", "only_reference", "only_candidate", "neither")
    }
