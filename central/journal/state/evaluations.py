"""Events of offers: to train, to evaluate, and a node's report."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from central.journal.events import Event, EventKind
from central.journal.records import EvaluationRecord, EvaluationReport, Suite, TrainOfferRecord
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.state import State, applies


@applies(EventKind.TRAIN_OFFERED)
def train_offered(state: State, event: Event) -> None:
    known(event, state.releases.first, event.cohort, "cohort")
    body = event.body
    offer = TrainOfferRecord(event.subject, event.cohort, body["max_rank"])
    state.changes.put(state.train_offers, event.cohort, offer)


@applies(EventKind.EVALUATION_OFFERED)
def evaluation_offered(state: State, event: Event) -> None:
    expect_new(event, state.evaluations)
    body = event.body
    references: dict[str, str] = body.get("references", {})
    for release_id in (body["candidate"], body["reference"], *references.values()):
        if known(event, state.releases, release_id, "release").cohort != event.cohort:
            raise conflict(event, f"release {release_id} is of another cohort")
    state.evaluations.put(
        EvaluationRecord(
            offer_id=event.subject,
            cohort=event.cohort,
            candidate=body["candidate"],
            reference=body["reference"],
            tasks=body["tasks"],
            deadline_at=body["deadline_at"],
            nodes=tuple(body["nodes"]),
            look=body.get("look", 1),
            references=references,
            suites={name: Suite(**suite) for name, suite in body.get("suites", {}).items()},
            so_far=body.get("so_far", {}),
            attempts=body.get("attempts", 1),
            temperature=body.get("temperature", 0.0),
        ),
    )


@applies(EventKind.EVALUATION_REPORTED)
def evaluation_reported(state: State, event: Event) -> None:
    record = known(event, state.evaluations, event.subject, "evaluation")
    body = event.body
    if (node_id := body["node_id"]) in record.reports or node_id not in record.nodes:
        raise conflict(event, f"node {node_id} has reported already or was not asked")
    late = state.releases[record.candidate].state != "candidate"
    report = EvaluationReport(
        node_id, tuple(body["results"]), body["abstain_reason"], event.at, late
    )
    state.evaluations.put(
        replace(record, reports={**record.reports, node_id: report}),
    )
    node = state.nodes[node_id]
    # A result in time, whether the verdict waited for it or not: the next one waits again.
    in_time = datetime.fromisoformat(event.at) <= datetime.fromisoformat(record.deadline_at)
    if node.silent_since and report.results and in_time:
        state.nodes.put(replace(node, silent_since=""))
