"""Events of releases: version 0 of a cohort, a candidate, a verdict on it.

Guarantee: a verdict moves the candidate's updates to merged or set aside, or back to waiting as
suspects that are tried in parts (isolation.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.isolation import after_verdict, bisect
from central.journal.records import PlanRecord, ReleaseRecord, ReleaseStateName, VerdictRecord
from central.journal.state.expect import conflict, known
from central.journal.state.forgets import decide_removal
from central.journal.state.moves import add_release, move, name_blobs_of, point, release_updates
from central.journal.state.state import State, applies

JUDGED = 100
"""Verdicts that are remembered per node."""


@applies(EventKind.COHORT_CREATED)
def cohort_created(state: State, event: Event) -> None:
    if event.cohort in state.releases.first:
        raise conflict(event, f"cohort {event.cohort!r} exists already")
    release = add_release(state, event, "accepted", None)
    name_blobs_of(state, release)
    state.releases.put_first(release)
    point(state, event, "stable", event.subject, "central")
    if other := event.body.get("builds_on"):
        known(event, state.releases.first, other, "cohort")
        state.changes.put(state.builds_on, event.cohort, other)


@applies(EventKind.CANDIDATE_BUILT)
def candidate_built(state: State, event: Event) -> None:
    record = known(event, state.plans, event.body["plan_id"], "plan")
    if record.decided or record.candidate is not None or record.plan.cohort != event.cohort:
        raise conflict(
            event, f"plan {record.plan_id} was cancelled or has candidate {record.candidate}"
        )
    release = add_release(state, event, "candidate", record.plan_id)
    name_blobs_of(state, release)
    planned = [update.update_id for update in record.plan.updates]
    if (release.manifest.plan, release.manifest.updates) != (record.plan_id, planned):
        raise conflict(
            event,
            f"the manifest names plan {release.manifest.plan} or other updates than its plan",
        )
    composition = release.manifest.composition
    if (composition.builds_on if composition else None) != record.plan.builds_on:
        raise conflict(
            event,
            f"the manifest has composition {composition}, the plan {record.plan.builds_on}",
        )
    state.plans.put(replace(record, candidate=event.subject))
    for update_id in planned:
        state.updates.put(replace(state.updates[update_id], release_id=event.subject))


@applies(EventKind.VERDICT)
def verdict_given(state: State, event: Event) -> None:
    release = known(event, state.releases, event.subject, "release")
    if release.state != "candidate" or release.plan_id is None or release.cohort != event.cohort:
        raise conflict(
            event,
            f"release {release.release_id} is {release.state}, not a candidate of {event.cohort!r}",
        )
    verdict = _verdict_of(event)
    standing: ReleaseStateName = "accepted" if verdict.accepted else "rejected"
    state.releases.put(replace(release, state=standing, verdict=verdict))
    plan = state.plans[release.plan_id]
    state.plans.put(replace(plan, decided=True))
    isolate = not verdict.accepted and bool(event.body.get("isolate", False))
    _settle_updates(state, event, plan, release, verdict, isolate)
    if plan.plan.removal is None:
        search_on(state, event, plan, isolate)
    else:
        decide_removal(state, plan, verdict)


def _verdict_of(event: Event) -> VerdictRecord:
    body = event.body
    return VerdictRecord(
        accepted=bool(body["accepted"]),
        text=body["text"],
        environments=body["environments"],
        high_water=body["high_water"],
        at=event.at,
        loss_accepted_by=body.get("loss_accepted_by", ""),
    )


def _settle_updates(
    state: State,
    event: Event,
    plan: PlanRecord,
    release: ReleaseRecord,
    verdict: VerdictRecord,
    isolate: bool,
) -> None:
    """Each update of the candidate is merged, set aside, or waits to be tried in a part of it."""
    updates = release.manifest.updates
    if isolate:
        if len(updates) < 2:
            raise conflict(event, "a candidate of one update cannot be isolated any further")
        release_updates(state, event, updates, ("planned",), True, release.manifest.label)
        return
    for update_id in updates:
        if verdict.accepted:
            move(state, event, update_id, "merged", ("planned",))
        else:
            reason = _why_rejected(plan, release, verdict)
            move(state, event, update_id, "set_aside", ("planned",), reason)
    if verdict.accepted or len(updates) == 1:
        remember_verdict(state, updates, blamed=not verdict.accepted)


def remember_verdict(state: State, update_ids: Collection[str], blamed: bool) -> None:
    """Remember a verdict on updates of nodes."""
    for update_id in update_ids:
        node = state.nodes[state.updates[update_id].manifest.node_id]
        state.nodes.put(replace(node, judged=(*node.judged, blamed)[-JUDGED:]))


def search_on(state: State, event: Event, plan: PlanRecord, isolate: bool) -> None:
    """Go on with the search for the update that hurts, begin one, or end it."""
    updates = [update.update_id for update in plan.plan.updates]
    halves = bisect((state.updates[u].manifest.node_id, u) for u in updates) if isolate else ()
    current = state.isolations.get(event.cohort)
    # The rejection of another plan begins another search.
    ours = current if plan.isolates or not isolate else None
    waiting = {update.update_id for update in state.waiting(event.cohort)}
    after = after_verdict(ours, plan.plan_id, waiting.difference(updates), halves)
    if after is not None:
        state.changes.put(state.isolations, event.cohort, after)
    elif current is not None:
        state.changes.drop(state.isolations, event.cohort)


def _why_rejected(plan: PlanRecord, release: ReleaseRecord, verdict: VerdictRecord) -> str:
    number = len(release.manifest.updates)
    what = "of this update alone" if number == 1 else f"of {number} updates"
    found = (
        f"isolated: candidate {release.manifest.label} {what}"
        if plan.isolates
        else f"candidate {release.manifest.label}"
    )
    return f"{found} was rejected: {verdict.text}"
