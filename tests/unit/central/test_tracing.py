"""The journal's events as spans: from an update's admission to its release and back."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import cast

from central.journal import Journal
from central.tracing import JournalTracer
from lorikeet import traces
from tests.fakes.spans import recorded_spans
from tests.fakes.state_only import StateOnly
from tests.unit.central import builders as make


def later(journal: StateOnly, seconds: float) -> None:
    at = datetime.fromisoformat(journal.at) + timedelta(seconds=seconds)
    journal.at = at.isoformat().replace("+00:00", "Z")


def test_an_updates_way_is_linked_from_round_to_switch() -> None:
    journal = StateOnly()
    genesis = make.make_release()
    journal.append(make.cohort_created(genesis), make.token_created(), make.node_enrolled())
    update = make.make_update(genesis)
    plan = make.make_plan(genesis, update)
    candidate = make.make_candidate(plan)
    with recorded_spans() as spans:
        JournalTracer(cast(Journal, journal)).start()
        traces.after("round", update.digest, 60.0, first=True)
        traces.after("upload", update.digest, 1.0)
        journal.append(make.admitted(update), make.planned(plan))
        later(journal, 30)
        journal.append(make.built(candidate))
        later(journal, 300)
        journal.append(make.decided(candidate, True))
        later(journal, 3600)
        journal.append(make.promoted(candidate))
        traces.after("switch", candidate.digest, 2.0)
        journal.append(make.rolled_back(genesis, candidate))
    assert spans.names == [
        "round", "upload", "admission", "merge", "gate", "release", "switch", "rollback",
    ]  # fmt: skip
    of_update = {spans.one(name).context.trace_id for name in ("round", "upload", "admission")}
    of_release = {spans.one(n).context.trace_id for n in ("merge", "gate", "release", "switch")}
    assert of_update == {int(update.digest[:32], 16)}
    assert of_release == {int(candidate.digest[:32], 16)}
    [link] = spans.one("merge").links
    assert link.context.trace_id in of_update
    took = {span.name: ((span.end_time or 0) - (span.start_time or 0)) // 10**9 for span in spans}
    assert (took["merge"], took["gate"], took["release"]) == (30, 300, 3600)
    parents = {span.parent.span_id for span in spans if span.parent and span.name == "gate"}
    assert parents == {spans.one("merge").context.span_id}


def test_what_began_before_this_process_has_no_length() -> None:
    journal = StateOnly()
    genesis = make.make_release()
    journal.append(make.cohort_created(genesis), make.token_created(), make.node_enrolled())
    update = make.make_update(genesis)
    plan = make.make_plan(genesis, update)
    journal.append(make.admitted(update), make.planned(plan))
    with recorded_spans() as spans:
        JournalTracer(cast(Journal, journal)).start()
        later(journal, 30)
        journal.append(make.built(make.make_candidate(plan)))
    merge = spans.one("merge")
    assert merge.start_time == merge.end_time
