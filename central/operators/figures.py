"""Figures of continual learning of each release, from what the gate has put into the journal.

In: the state. Out: messages. A row is what the verdict says of the candidate, whatever it decided.
The base's row is from verdicts that compared with version 0. An environment is learnt by the first
release that holds an update of a node which measures it; an anchor is what the base could do. A
release's line is its own: candidates that were rejected are no part of a later one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

from central.gate.continual import Continual, Course
from central.journal import ReleaseRecord, State
from protos.operators.v1 import operators_pb2

KL = "kl_release"
"""Metric of an update's manifest: KL(node || release that it started from), nats a token."""


def figures_of(state: State, release: ReleaseRecord) -> operators_pb2.ContinualFigures | None:
    """Of one release; None while nobody measured it."""
    *_, (_, found) = each_figures(state, reversed(state.lineage(release.release_id)))
    return found


def each_figures(
    state: State, releases: Iterable[ReleaseRecord]
) -> Iterator[tuple[ReleaseRecord, operators_pb2.ContinualFigures | None]]:
    """Each release with its figures. A parent comes before its children in `releases`."""
    courses: dict[str, Course] = {}
    measures: dict[str, dict[str, set[str]]] = {}
    for release in releases:
        cohort, parent = release.cohort, release.manifest.parent
        if parent is None:
            measures[cohort] = _measures(state, cohort)
            course = Course.of_base(*_base(state, release))
        else:
            nodes = {state.updates[u].manifest.node_id for u in release.manifest.updates}
            learnt = {name for node in nodes for name in measures[cohort].get(node, ())}
            course = courses[parent].then(_row(release), learnt)
        courses[release.release_id] = course
        yield release, _message(state, release, course.figures())


def _row(release: ReleaseRecord) -> dict[str, float]:
    """Success of the candidate by environment of tasks."""
    return {name: found["candidate"] for name, found in _rates(release).items()}


def _rates(release: ReleaseRecord) -> dict[str, dict[str, float]]:
    verdict = release.verdict
    return {
        name: {
            "candidate": (figures["both"] + figures["only_candidate"]) / figures["total"],
            "reference": (figures["both"] + figures["only_reference"]) / figures["total"],
        }
        for name, figures in (verdict.environments if verdict else {}).items()
        if "likelihood" not in figures and figures.get("total")
    }


def _base(state: State, genesis: ReleaseRecord) -> tuple[dict[str, float], set[str]]:
    """The base's row, and the anchors of its cohort."""
    row: dict[str, float] = {}
    anchors: set[str] = set()
    for release in state.releases.values():
        if release.cohort != genesis.cohort or release.verdict is None:
            continue
        rates = _rates(release)
        for name, figures in release.verdict.environments.items():
            if figures["anchor"]:
                anchors.add(name)
            if name in rates and figures.get("reference") == genesis.release_id:
                row.setdefault(name, rates[name]["reference"])
    return row, anchors


def _measures(state: State, cohort: str) -> dict[str, set[str]]:
    """Node -> environments that it ever measured."""
    found: dict[str, set[str]] = {}
    for offer in state.evaluations.values():
        if offer.cohort == cohort:
            for report in offer.reports.values():
                names = {str(result["environment"]) for result in report.results}
                found.setdefault(report.node_id, set()).update(names)
    return found


def _message(
    state: State, release: ReleaseRecord, found: Continual
) -> operators_pb2.ContinualFigures | None:
    if not found.environments or release.verdict is None:
        return None
    worst = found.worst
    return operators_pb2.ContinualFigures(
        environments=found.environments,
        average=_percent(found.average),
        backward_transfer=_percent(found.backward_transfer),
        forward_transfer=_percent(found.forward_transfer),
        forgetting=_percent(found.forgetting),
        worst_environment=worst.environment if worst else "",
        worst_best=_percent(worst.best) if worst else None,
        worst_now=_percent(worst.now) if worst else None,
        **_every_attempt(release.verdict.environments),
        **_kl(state, release),
    )


def _every_attempt(environments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """pass^k over the environments with as many attempts as any; nothing with one attempt."""
    tried = [figures for figures in environments.values() if figures.get("every_attempt")]
    attempts = max((figures["attempts"] for figures in tried), default=1)
    passed = [
        (figures["every_attempt"]["both"] + figures["every_attempt"]["only_candidate"])
        / figures["total"]
        for figures in tried
        if figures["attempts"] == attempts
    ]
    return {"attempts": attempts, "every_attempt": 100 * mean(passed)} if passed else {}


def _kl(state: State, release: ReleaseRecord) -> dict[str, Any]:
    stated = [
        state.updates[update_id].manifest.metrics[KL]
        for update_id in release.manifest.updates
        if KL in state.updates[update_id].manifest.metrics
    ]
    return {"kl_release": mean(stated), "kl_updates": len(stated)} if stated else {}


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
