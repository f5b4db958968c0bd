"""Paired log-probabilities of documents: the other kind of evidence beside counts.

In: the fields of lorikeet.releases.v1.PairedLikelihood. Out: one PairedLikelihood per environment.
A document's value is its mean log-probability a token, in nats, so each document counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from central.gate.students_t import mean_below


@dataclass(frozen=True)
class Differences:
    """Candidate less reference on the same documents, at least one."""

    documents: int
    tokens: int
    reference_mean: float
    """Mean of the documents' values under the reference."""
    candidate_mean: float
    difference_sum: float
    difference_square_sum: float

    @property
    def total(self) -> int:
        return self.documents

    @property
    def fall(self) -> float:
        """Reference's mean less the candidate's, in nats a token; negative for a gain."""
        return -self.difference_sum / self.documents

    def p_fall(self) -> float:
        """p-value of "no document lost on average": small after a loss."""
        return self._below(1, 0.0)

    def p_fine(self, margin: float) -> float:
        """p-value of "the loss is at least `margin`": small when surely less."""
        return self._below(-1, margin)

    def p_gain(self) -> float:
        """p-value of "no document gained on average": small after a gain."""
        return self._below(-1, 0.0)

    def _below(self, sign: int, bound: float) -> float:
        total = sign * self.difference_sum
        return mean_below(self.documents, total, self.difference_square_sum, bound)

    def __add__(self, other: Differences) -> Differences:
        """Of other documents."""
        documents = self.documents + other.documents
        mine, others = self.documents / documents, other.documents / documents
        return Differences(
            documents,
            self.tokens + other.tokens,
            mine * self.reference_mean + others * other.reference_mean,
            mine * self.candidate_mean + others * other.candidate_mean,
            self.difference_sum + other.difference_sum,
            self.difference_square_sum + other.difference_square_sum,
        )


@dataclass(frozen=True)
class PairedLikelihood:
    """One environment's documents."""

    environment: str
    anchor: bool
    differences: Differences
    nodes: int = 1
    unit: ClassVar[str] = "nats"
    scale: ClassVar[float] = 1.0
    digits: ClassVar[int] = 6

    @property
    def total(self) -> int:
        return self.differences.total

    @property
    def measures(self) -> tuple[Differences, ...]:
        """What is tested."""
        return (self.differences,)

    @staticmethod
    def read(result: Mapping[str, Any]) -> PairedLikelihood:
        """Of one node; `result` has a likelihood."""
        return PairedLikelihood(
            str(result["environment"]),
            bool(result["anchor"]),
            Differences(**result["likelihood"]),
        )

    @staticmethod
    def order(item: PairedLikelihood) -> tuple[float, ...]:
        """Sorts what several nodes say of the same documents, the largest fall last."""
        found = item.differences
        return (found.fall, found.documents, found.tokens, found.reference_mean)

    @staticmethod
    def join(spoken: Sequence[PairedLikelihood], anchor: bool, nodes: int) -> PairedLikelihood:
        """Of one environment, each of other documents."""
        differences = spoken[0].differences
        for item in spoken[1:]:
            differences += item.differences
        return PairedLikelihood(spoken[0].environment, anchor, differences, nodes)

    def to_json(self) -> dict[str, Any]:
        """As stored in the verdict event."""
        return {
            "environment": self.environment,
            "anchor": self.anchor,
            "nodes": self.nodes,
            "likelihood": asdict(self.differences),
            "total": self.total,
        }
