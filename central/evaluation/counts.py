"""Paired counts per environment, pooled over the nodes that measured it and the looks at which they did.

In: reported results (the fields of lorikeet.releases.v1.EnvironmentResult) per node. Out: one PairedCounts per
environment, sorted by name. Guarantee: the same tasks count once, however often and by however many nodes they were
measured: answers are greedy, so a second node repeats the first one's outcomes and is no further evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class Outcomes:
    """Candidate and reference on the same tasks: n = both + only_reference + only_candidate + neither."""

    both: int
    only_reference: int
    only_candidate: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.only_reference + self.only_candidate + self.neither

    @property
    def fall(self) -> float:
        """How far the candidate's pass rate is below the reference's, as a fraction; negative for a gain."""
        return (self.only_reference - self.only_candidate) / self.total

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(
            self.both + other.both,
            self.only_reference + other.only_reference,
            self.only_candidate + other.only_candidate,
            self.neither + other.neither,
        )


@dataclass(frozen=True)
class PairedCounts:
    """One environment's outcomes; those of the first answers (pass^1), and with several attempts of all of them (pass^k)."""

    environment: str
    anchor: bool
    both: int
    only_reference: int
    only_candidate: int
    neither: int
    nodes: int = 1
    attempts: int = 1
    every_attempt: Outcomes | None = None
    """Passed means here that every attempt passed; None with one attempt."""

    @property
    def first(self) -> Outcomes:
        """Outcomes of the first answers."""
        return Outcomes(self.both, self.only_reference, self.only_candidate, self.neither)

    @property
    def total(self) -> int:
        return self.first.total

    @property
    def candidate_passed(self) -> int:
        return self.both + self.only_candidate

    @property
    def reference_passed(self) -> int:
        return self.both + self.only_reference

    def to_json(self) -> dict[str, Any]:
        """As stored in the verdict event; `every_attempt` only where there are several."""
        fields = {key: value for key, value in asdict(self).items() if value is not None}
        return {**fields, "total": self.total}


def pool(reports: Iterable[tuple[str, Iterable[Mapping[str, Any]]]]) -> list[PairedCounts]:
    """Counts per environment from (node_id, results) pairs; results without tasks are left out.

    Of nodes that measured the same tasks the one with the median fall speaks (of two the larger fall), so that of three
    no single one decides. An environment is anchor skill only when every node says so: the wider tolerance is not one
    node's choice.
    """
    measured: dict[str, dict[str, dict[str, PairedCounts]]] = {}  # environment -> tasks digest -> node
    for node_id, results in reports:
        for result in results:
            counts = _counts(result)
            if counts.total > 0:
                suites = measured.setdefault(counts.environment, {})
                suites.setdefault(str(result["tasks_digest"]), {}).setdefault(node_id, counts)
    return [_pool_suites(name, measured[name]) for name in sorted(measured)]


def _counts(result: Mapping[str, Any]) -> PairedCounts:
    every = result.get("every_attempt")
    return PairedCounts(
        str(result["environment"]),
        bool(result["anchor"]),
        **_outcomes(result),
        attempts=max(1, int(result.get("attempts", 1))),
        every_attempt=None if every is None else Outcomes(**_outcomes(every)),
    )


def _outcomes(fields: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(fields[f"{name}_passed"]) for name in ("both", "only_reference", "only_candidate", "neither")}


def _pool_suites(environment: str, suites: Mapping[str, Mapping[str, PairedCounts]]) -> PairedCounts:
    spoken = [_median(list(by_node.values())) for by_node in suites.values()]
    every = [counts.every_attempt for counts in spoken if counts.every_attempt is not None]
    alike = len(every) == len(spoken) and len({counts.attempts for counts in spoken}) == 1
    return PairedCounts(
        environment,
        all(counts.anchor for by_node in suites.values() for counts in by_node.values()),
        **asdict(reduce(Outcomes.__add__, (counts.first for counts in spoken))),
        nodes=len({node_id for by_node in suites.values() for node_id in by_node}),
        attempts=spoken[0].attempts if alike else 1,
        every_attempt=reduce(Outcomes.__add__, every) if alike else None,
    )


def _median(repeats: list[PairedCounts]) -> PairedCounts:
    ordered = sorted(repeats, key=lambda c: (c.only_reference - c.only_candidate, c.only_reference, c.both))
    return ordered[len(ordered) // 2]
