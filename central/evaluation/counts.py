"""Paired counts per environment, pooled over the nodes that measured it.

In: reported results (the fields of lorikeet.releases.v1.EnvironmentResult) per node. Out: one PairedCounts per
environment, sorted by name. Guarantee: a node's result on the same tasks counts once, however often it was reported.
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

    An environment is anchor skill only when every node says so: the wider tolerance is not one node's choice.
    """
    seen: set[tuple[str, str, str]] = set()
    pooled: dict[str, PairedCounts] = {}
    contributors: dict[str, set[str]] = {}
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
            name = counts.environment
            key = (node_id, name, str(result["tasks_digest"]))
            if counts.total == 0 or key in seen:
                continue
            seen.add(key)
            contributors.setdefault(name, set()).add(node_id)
            pooled[name] = _add(pooled[name], counts, len(contributors[name])) if name in pooled else counts
    return [pooled[name] for name in sorted(pooled)]


def _add(left: PairedCounts, right: PairedCounts, nodes: int) -> PairedCounts:
    return PairedCounts(
        environment=left.environment,
        anchor=left.anchor and right.anchor,
        both=left.both + right.both,
        only_reference=left.only_reference + right.only_reference,
        only_candidate=left.only_candidate + right.only_candidate,
        neither=left.neither + right.neither,
        nodes=nodes,
    )
