"""The moves that events of several nouns share: an update, a plan, a release or a channel moves.

In: one event and what it says of a record. Out: changed records. Errors: JournalConflict for a move
that does not fit.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable
from dataclasses import replace

from central.journal.events import Event
from central.journal.records import (
    ChannelChange,
    PlanRecord,
    ReleaseRecord,
    ReleaseStateName,
    UpdateStateName,
    VerdictRecord,
)
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.state import State
from protos.manifest import ReleaseManifest, sha256_hex

REVOKED = "its node was revoked"
"""Why the updates of a revoked node are set aside."""


def move(
    state: State,
    event: Event,
    update_id: str,
    to: UpdateStateName,
    origins: tuple[UpdateStateName, ...],
    reason: str = "",
    plan_id: str | None = None,
) -> None:
    update = known(event, state.updates, update_id, "update")
    if update.state not in origins or update.cohort != event.cohort:
        raise conflict(
            event,
            f"update {update_id} of cohort {update.cohort!r} is {update.state}, "
            f"not {' or '.join(origins)}",
        )
    held = to in ("merged", "set_aside")
    state.updates.put(
        replace(
            update,
            state=to,
            reason=reason,
            since=event.at,
            plan_id=plan_id or (update.plan_id if held else None),
            release_id=update.release_id if held else None,
            lost=False,
        )
    )


def release_updates(
    state: State,
    event: Event,
    update_ids: Iterable[str],
    origins: tuple[UpdateStateName, ...],
    requeue: bool,
    label: str,
) -> None:
    for update_id in update_ids:
        node = state.nodes[state.updates[update_id].manifest.node_id]
        if not requeue:
            move(state, event, update_id, "set_aside", origins, f"{label} was rolled back")
        elif node.revoked:
            move(state, event, update_id, "set_aside", origins, REVOKED)
        elif node.quarantine:
            move(state, event, update_id, "quarantined", origins, node.quarantine)
        else:
            move(state, event, update_id, "waiting", origins)


def is_merged_in(state: State, update_id: str, release_id: str) -> bool:
    """Whether the release still has the update.

    A withdrawn release may have lost it before: to another release, or because it was forgotten.
    """
    update = state.updates[update_id]
    return (update.state, update.release_id) == ("merged", release_id)


def cancel_plan_of(state: State, event: Event, update_id: str, reason: str = "") -> None:
    # A plan that loses an update stands for something else than its candidate: its other updates
    # wait again.
    update = known(event, state.updates, update_id, "update")
    if update.state == "planned" and update.plan_id is not None:
        why = f"update {update.update_id[:8]} was taken away{': ' if reason else ''}{reason}"
        cancel(state, event, state.plans[update.plan_id], why, requeue=True)


def cancel(state: State, event: Event, plan: PlanRecord, why: str, requeue: bool) -> None:
    state.plans.put(replace(plan, decided=True))
    if (
        plan.plan.removal is not None
    ):  # the order stands: it is planned anew, on the head that there is then
        order = state.forgets[plan.plan.removal.order]
        state.forgets.put(replace(order, state="ordered", plan_id=None))
    label = f"plan {plan.plan_id[:8]}"
    if plan.candidate is not None:
        release = state.releases[plan.candidate]
        label = release.manifest.label
        verdict = VerdictRecord(False, f"cancelled: {why}", {}, {}, event.at)
        state.releases.put(replace(release, state="rejected", verdict=verdict))
    release_updates(
        state,
        event,
        [update.update_id for update in plan.plan.updates],
        ("planned",),
        requeue,
        label,
    )


def cancel_built_on(
    state: State, event: Event, gone: Collection[str], how: str, requeue: bool
) -> None:
    """Cancel the plans that build on releases which are `gone`."""
    for plan in state.open_plans(event.cohort):
        if plan.plan.parent in gone:
            cancel(state, event, plan, f"its parent was {how}", requeue)
    # In cohorts that build on this one: such a composition is not worth an evaluation. A merge of
    # updates keeps its base.
    for plan in [plan for cohort in state.builds_on for plan in state.open_plans(cohort)]:
        if plan.plan.builds_on in gone and not plan.plan.updates and plan.plan.removal is None:
            cancel(state, event, plan, f"the release that it builds on was {how}", requeue)


def point(state: State, event: Event, channel: str, release_id: str | None, by: str) -> None:
    key = (event.cohort, channel)
    if release_id is None:
        state.changes.drop(state.channels, key)
    else:
        state.changes.put(state.channels, key, release_id)
    change = ChannelChange(channel, release_id, by, event.at, event.sequence)
    state.changes.append(state.channel_changes, key, change)


def add_release(
    state: State, event: Event, standing: ReleaseStateName, plan_id: str | None
) -> ReleaseRecord:
    expect_new(event, state.releases)
    data = event.body["manifest"].encode()
    manifest = ReleaseManifest.from_bytes(data)
    if sha256_hex(data) != event.subject or manifest.cohort != event.cohort:
        raise conflict(
            event, f"its manifest has digest {sha256_hex(data)} and cohort {manifest.cohort!r}"
        )
    record = ReleaseRecord(
        release_id=event.subject,
        manifest=manifest,
        manifest_bytes=data,
        signature=base64.b64decode(event.body["signature"]),
        cohort=event.cohort,
        state=standing,
        sequence=event.sequence,
        plan_id=plan_id,
        server_state=event.body.get("server_state"),
    )
    state.releases.put(record)
    return record


def name_blobs_of(state: State, release: ReleaseRecord) -> None:
    manifest = release.manifest
    name_blobs(
        state,
        (
            manifest.payload.digest_sha256,
            manifest.own_payload.digest_sha256,
            release.server_state,
        ),
    )


def name_blobs(state: State, digests: Iterable[str | None]) -> None:
    """Take these blobs out of the collected ones, because an event names them."""
    for digest in digests:
        if digest is not None and digest in state.collected:
            state.changes.drop(state.collected, digest)
            state.updates.count_payload(digest, 1)
