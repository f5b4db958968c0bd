"""Events of channels: a release is promoted, a line is rolled back, a node reports on a canary.

Guarantee: a canary that is rolled back leaves stable where it is, and what it had merged waits
again or is set aside.
"""

from __future__ import annotations

from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.records import CanaryReport
from central.journal.state.expect import conflict, expect_accepted, known
from central.journal.state.forgets import fail_removals, settle_forgets, withdraw_composed
from central.journal.state.moves import cancel_built_on, is_merged_in, point, release_updates
from central.journal.state.state import State, applies


@applies(EventKind.PROMOTED)
def promoted(state: State, event: Event) -> None:
    expect_accepted(state, event, event.subject)
    before = state.channels[(event.cohort, "stable")]
    for channel in event.body.get("ends", ()):
        point(state, event, channel, None, event.body["by"])
    point(state, event, event.body["channel"], event.subject, event.body["by"])
    settle_forgets(state, event)
    withdraw_composed(state, event.cohort, since=before)


@applies(EventKind.ROLLED_BACK)
def rolled_back(state: State, event: Event) -> None:
    body = event.body
    abandoned: list[str] = body["abandoned"]
    rolled = body.get("channel", "stable")
    expect_accepted(state, event, event.subject)
    if (
        state.channels.get((event.cohort, rolled)) != body["from_release"]
        or event.subject in abandoned
    ):
        raise conflict(
            event,
            f"release {body['from_release']} is not the {rolled} head of {event.cohort!r}",
        )
    if rolled != "stable" and state.channels[(event.cohort, "stable")] in abandoned:
        raise conflict(event, "the stable head would be abandoned with the canary")
    requeue = body["updates"] == "requeue"
    for release_id in abandoned:
        release = known(event, state.releases, release_id, "release")
        if release.state != "withdrawn":  # which stays withdrawn: it is the stronger word
            expect_accepted(state, event, release_id)
            state.releases.put(replace(release, state="abandoned"))
        held = [u for u in release.manifest.updates if is_merged_in(state, u, release_id)]
        release_updates(state, event, held, ("merged",), requeue, release.manifest.label)
    cancel_built_on(state, event, abandoned, "rolled back", requeue)
    fail_removals(state, event.cohort, abandoned)
    for _, channel in [
        key for key, head in state.channels.items() if head in abandoned and key[1] != "stable"
    ]:
        point(state, event, channel, None, body["by"])
    if rolled == "stable" or state.channels[(event.cohort, "stable")] != event.subject:
        point(state, event, rolled, event.subject, body["by"])
    settle_forgets(state, event)


@applies(EventKind.CANARY_REPORTED)
def canary_reported(state: State, event: Event) -> None:
    node = known(event, state.nodes, event.body["node_id"], "node")
    canary = state.channels.get((event.cohort, "canary"))
    if canary != event.subject or node.cohort != event.cohort or node.revoked:
        raise conflict(
            event,
            f"the canary is {canary}; node {node.node_id} of {node.cohort!r}, "
            f"revoked {node.revoked}",
        )
    report = CanaryReport(node.node_id, event.body["condition"], event.body["problem"], event.at)
    state.changes.append(state.canary_reports, event.subject, report)
