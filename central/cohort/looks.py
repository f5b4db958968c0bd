"""The looks of an evaluation: what the next offer asks, and what the reports so far say.

In: the state. Out: an `Ask`, evidence for the gate. Pure: everything follows from offers and
reports in the journal, so a central that was killed between two looks goes on with the same one.

A look is one or more offers. An offer is repeated when the first look missed its quorum. The first
look asks every environment of every node. A later look asks fresh tasks of the environments that
are still undecided, from the nodes that answered for them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from central.gate import Evidence, Figures, high_water, open_environments, pool
from central.journal import EvaluationRecord, EvaluationReport, State, Suite
from central.settings import GateSettings

Result = Mapping[str, Any]
"""The fields of lorikeet.releases.v1.EnvironmentResult."""


@dataclass(frozen=True)
class Ask:
    """What one evaluation offer asks; see EvaluationRecord for the fields."""

    candidate: str
    reference: str
    tasks: int
    attempts: int = 1
    temperature: float = 0.0
    look: int = 1
    references: Mapping[str, str] = field(default_factory=dict)
    suites: Mapping[str, Suite] = field(default_factory=dict)
    so_far: Mapping[str, Figures] = field(default_factory=dict)
    nodes: tuple[str, ...] | None = None
    """None: every node of the cohort."""

    def to_body(self) -> dict[str, Any]:
        """The fields of the journal's event, but for the nodes and the deadline."""
        fields = asdict(self)
        del fields["nodes"]
        return fields


def high_water_releases(state: State, cohort: str) -> dict[str, str]:
    """Environment -> the release to compare with; without those that nobody measured yet."""
    accepted = [r for r in state.releases.values() if r.cohort == cohort and r.state == "accepted"]
    verdicts = [(r.release_id, r.verdict.environments) for r in accepted if r.verdict]
    return high_water(verdicts, {release.release_id for release in accepted})


def current_look(state: State, candidate: str, parent: str, settings: GateSettings) -> Ask:
    """The look that the candidate is at: the last one that was offered.

    It is the first look while too few nodes have answered that. A node that was revoked since does
    not count.
    """
    offers = offers_of(state, candidate)
    if offers and offers[-1].look > 1 and has_quorum(state, candidate, settings.quorum):
        last = offers[-1]
        return Ask(
            candidate,
            parent,
            last.tasks,
            last.attempts,
            last.temperature,
            last.look,
            last.references,
            last.suites,
            last.so_far,
            last.nodes,
        )
    best = high_water_releases(state, state.releases[candidate].cohort)
    several = settings.attempts > 1
    return Ask(
        candidate,
        parent,
        settings.tasks,
        settings.attempts,
        settings.temperature if several else 0.0,
        references={name: release for name, release in sorted(best.items()) if release != parent},
    )


def has_quorum(state: State, candidate: str, quorum: int) -> bool:
    """Whether enough nodes that are not revoked evaluated at the first look."""
    return count_results(state, candidate) >= quorum


def count_results(state: State, candidate: str) -> int:
    """How many nodes that are not revoked evaluated at the first look."""
    return sum(map(is_result, reports_of_look(state, offers_of(state, candidate, 1)).values()))


def evidence(state: State, candidate: str) -> tuple[list[Evidence], dict[str, Figures]]:
    """Evidence on the environments of the last look; figures of those settled earlier."""
    offers = offers_of(state, candidate)
    last = offers[-1]
    settled = {name: figures for name, figures in last.so_far.items() if name not in last.suites}
    names = {str(result["environment"]) for _, _, result in _results(state, offers)}
    found = [_evidence(state, offers, name) for name in sorted(names - settled.keys())]
    return [item for item in found if item is not None], settled


def next_look(
    state: State, candidate: str, found: Mapping[str, Figures], settings: GateSettings
) -> Ask:
    """Fresh tasks for each environment left open: about as many as it had, over all nodes."""
    offers = offers_of(state, candidate)
    last = offers[-1]
    suites, nodes = {}, set()
    for name in open_environments(found):
        answering = _answering(state, offers, name, found[name]["reference"])
        total = found[name]["total"]
        more = min(total, settings.max_tasks - total)
        suites[name] = Suite(_tasks_asked(offers, name), math.ceil(more / len(answering)))
        nodes |= answering
    return Ask(
        candidate,
        last.reference,
        max(suite.tasks for suite in suites.values()),
        last.attempts,
        last.temperature,
        max(offer.look for offer in offers) + 1,
        {
            name: found[name]["reference"]
            for name in suites
            if found[name]["reference"] != last.reference
        },
        suites,
        found,
        tuple(sorted(nodes)),
    )


def _tasks_asked(offers: Sequence[EvaluationRecord], name: str) -> int:
    """The most tasks of an environment that any node was asked.

    The last offer need not be the furthest: when a revocation breaks the quorum of the first look,
    that is offered again.
    """
    suites = [suite for offer in offers if (suite := offer.suite(name)) is not None]
    return max(suite.first_task + suite.tasks for suite in suites)


def offers_of(state: State, candidate: str, look: int | None = None) -> list[EvaluationRecord]:
    """The candidate's offers, oldest first, those of one look when it is given."""
    return [offer for offer in state.offers_of(candidate) if look in (None, offer.look)]


def reports_of_look(
    state: State, offers: Sequence[EvaluationRecord]
) -> dict[str, EvaluationReport]:
    """The report of every node that is not revoked, over the offers of one look.

    A result stays when a later offer gets an abstention.
    """
    found: dict[str, EvaluationReport] = {}
    for offer in offers:
        for node_id, report in sorted(offer.reports.items()):
            if not state.nodes[node_id].revoked and (
                node_id not in found or not is_result(found[node_id])
            ):
                found[node_id] = report
    return found


def missing(state: State, offers: Sequence[EvaluationRecord]) -> set[str]:
    """Nodes of the look's last offer that are not revoked and have not reported at the look."""
    asked = {node for node in offers[-1].nodes if not state.nodes[node].revoked}
    return asked - reports_of_look(state, offers).keys()


def is_result(report: EvaluationReport) -> bool:
    """Whether the node evaluated, rather than abstained."""
    return bool(report.results) and not report.abstain_reason


def unjudged(state: State, candidate: str, found: Collection[str]) -> dict[str, list[str]]:
    """Environments that nobody measured, by node.

    The node was asked, and had them in its last result before this candidate. Now it gave none, or
    one without them: an environment may be out of order.
    """
    asked = {
        node_id
        for offer in offers_of(state, candidate, 1)
        for node_id in offer.nodes
        if not state.nodes[node_id].revoked
    }
    last: dict[str, set[str]] = {}
    for offer in reversed(state.evaluations.values()):
        if len(last) == len(asked):
            break
        if offer.look > 1 or offer.candidate == candidate:
            continue
        for node_id in asked.difference(last).intersection(offer.reports):
            if is_result(offer.reports[node_id]):
                last[node_id] = {
                    str(result["environment"]) for result in offer.reports[node_id].results
                }
    return {
        node_id: left
        for node_id, names in sorted(last.items())
        if (left := sorted(names.difference(found)))
    }


def _results(
    state: State, offers: Sequence[EvaluationRecord]
) -> Iterator[tuple[EvaluationRecord, str, Result]]:
    """(offer, node, result) of nodes that are not revoked."""
    for offer in offers:
        for node_id, report in sorted(offer.reports.items()):
            if not state.nodes[node_id].revoked and is_result(report):
                for result in report.results:
                    yield offer, node_id, result


def _evidence(state: State, offers: Sequence[EvaluationRecord], name: str) -> Evidence | None:
    last = offers[-1]
    wanted = last.compared_with(name)
    measured = [
        item
        for item in _results(state, offers)
        if item[2]["environment"] == name and _total(item[2]) > 0
    ]
    with_wanted = [item for item in measured if _compared_with(item[0], item[2]) == wanted]
    # No node could compare with the high-water release: then the parent is what there is.
    reference = wanted if with_wanted else last.reference
    chosen = with_wanted or [
        item for item in measured if _compared_with(item[0], item[2]) == reference
    ]
    counts = pool((node_id, [result]) for _, node_id, result in chosen)
    if not counts:
        return None
    # Not the totals of the look before: a node that was revoked since counts no longer, and that
    # leaves others to ask.
    before = pool(
        (node_id, [result]) for offer, node_id, result in chosen if offer.look < last.look
    )
    reasons = [str(result.get("fallback_reason", "")) for _, _, result in chosen]
    return Evidence(
        counts=counts[0],
        reference=reference,
        label=state.releases[reference].manifest.label,
        spent=max(offer.so_far.get(name, {}).get("spent", 0.0) for offer in offers),
        last=(bool(before) and counts[0].total <= before[0].total)
        or not _answering(state, offers, name, reference),
        fallback_reason=next(filter(None, reasons), ""),
    )


def _answering(
    state: State, offers: Sequence[EvaluationRecord], name: str, reference: str
) -> set[str]:
    """Nodes that gave every task that the last look asked: they may have more."""
    return {
        node_id
        for offer, node_id, result in _results(state, offers)
        if offer.look == offers[-1].look
        and (suite := offer.suite(name)) is not None
        and (result["environment"], _compared_with(offer, result)) == (name, reference)
        and 0 < suite.tasks <= _total(result)
    }


def _compared_with(offer: EvaluationRecord, result: Result) -> str:
    return str(result.get("reference_id") or offer.compared_with(str(result["environment"])))


def _total(result: Result) -> int:
    if "likelihood" in result:
        return int(result["likelihood"]["documents"])
    fields = ("both_passed", "only_reference_passed", "only_candidate_passed", "neither_passed")
    return sum(int(result[key]) for key in fields)
