"""Reports of nodes become evidence per environment.

In: reported results (the fields of lorikeet.releases.v1.EnvironmentResult) per node. Out: one
PairedCounts or PairedLikelihood per environment, sorted by name. Guarantee: the same tasks or
documents count once, however often and by however many nodes they were measured: answers are
greedy, so a second node repeats the first one's outcomes and is no further evidence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from central.gate.counts import PairedCounts
from central.gate.likelihood import PairedLikelihood

Paired = PairedCounts | PairedLikelihood
Suites = dict[str, dict[str, Any]]
"""Digest of the tasks -> node -> what it measured, all of one kind."""


def pool(reports: Iterable[tuple[str, Iterable[Mapping[str, Any]]]]) -> list[Paired]:
    """Evidence per environment from (node_id, results) pairs; empty results are left out.

    Of nodes that measured the same tasks the one with the median fall speaks (of two the larger
    fall), so that of three no single one decides. An environment is anchor skill only when every
    node says so: the wider tolerance is not one node's choice. Where nodes have tasks and texts
    under one name, the kind of more nodes counts, of as many the tasks.
    """
    measured: dict[str, dict[type[Paired], Suites]] = {}
    for node_id, results in reports:
        for result in results:
            kind = PairedLikelihood if "likelihood" in result else PairedCounts
            item = kind.read(result)
            if item.total > 0:
                kinds = measured.setdefault(item.environment, {PairedCounts: {}})
                suites = kinds.setdefault(kind, {})
                suites.setdefault(str(result["tasks_digest"]), {}).setdefault(node_id, item)
    return [_pool_suites(*_main_kind(measured[name])) for name in sorted(measured)]


def _main_kind(kinds: Mapping[type[Paired], Suites]) -> tuple[type[Paired], Suites]:
    return max(kinds.items(), key=lambda kind: len(_nodes(kind[1])))


def _pool_suites(kind: type[Paired], suites: Suites) -> Paired:
    ordered = [sorted(by_node.values(), key=kind.order) for by_node in suites.values()]
    return kind.join(
        [repeats[len(repeats) // 2] for repeats in ordered],
        anchor=all(item.anchor for repeats in ordered for item in repeats),
        nodes=len(_nodes(suites)),
    )


def _nodes(suites: Suites) -> set[str]:
    return {node_id for by_node in suites.values() for node_id in by_node}
