"""Paired counts per environment, pooled over the nodes that measured it.

In: reported results (the fields of lorikeet.releases.v1.EnvironmentResult) per node. Out: one PairedCounts per
environment, sorted by name. Guarantee: the same tasks count once, however often and by however many nodes they were
measured: answers are greedy, so a second node repeats the first one's outcomes and is no further evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PairedCounts:
    """Candidate and reference on the same tasks: n = both + only_reference + only_candidate + neither."""

    environment: str
    anchor: bool
    both: int
    only_reference: int
    only_candidate: int
    neither: int
    nodes: int = 1

    @property
    def total(self) -> int:
        return self.both + self.only_reference + self.only_candidate + self.neither

    @property
    def candidate_passed(self) -> int:
        return self.both + self.only_candidate

    @property
    def reference_passed(self) -> int:
        return self.both + self.only_reference

    def to_json(self) -> dict[str, Any]:
        """As stored in the verdict event."""
        return {**asdict(self), "total": self.total}


def pool(reports: Iterable[tuple[str, Iterable[Mapping[str, Any]]]]) -> list[PairedCounts]:
    """Counts per environment from (node_id, results) pairs; results without tasks are left out.

    Of nodes that measured the same tasks the one with the median fall speaks (of two the larger fall), so that of three
    no single one decides. An environment is anchor skill only when every node says so: the wider tolerance is not one
    node's choice.
    """
    measured: dict[str, dict[str, dict[str, PairedCounts]]] = {}  # environment -> tasks digest -> node
    for node_id, results in reports:
        for result in results:
            counts = PairedCounts(
                environment=str(result["environment"]),
                anchor=bool(result["anchor"]),
                both=int(result["both_passed"]),
                only_reference=int(result["only_reference_passed"]),
                only_candidate=int(result["only_candidate_passed"]),
                neither=int(result["neither_passed"]),
            )
            if counts.total > 0:
                suites = measured.setdefault(counts.environment, {})
                suites.setdefault(str(result["tasks_digest"]), {}).setdefault(node_id, counts)
    return [_pool_suites(name, measured[name]) for name in sorted(measured)]


def _pool_suites(environment: str, suites: Mapping[str, Mapping[str, PairedCounts]]) -> PairedCounts:
    spoken = [_median(list(by_node.values())) for by_node in suites.values()]
    return PairedCounts(
        environment=environment,
        anchor=all(counts.anchor for by_node in suites.values() for counts in by_node.values()),
        both=sum(counts.both for counts in spoken),
        only_reference=sum(counts.only_reference for counts in spoken),
        only_candidate=sum(counts.only_candidate for counts in spoken),
        neither=sum(counts.neither for counts in spoken),
        nodes=len({node_id for by_node in suites.values() for node_id in by_node}),
    )


def _median(repeats: list[PairedCounts]) -> PairedCounts:
    ordered = sorted(repeats, key=lambda c: (c.only_reference - c.only_candidate, c.only_reference, c.both))
    return ordered[len(ordered) // 2]
