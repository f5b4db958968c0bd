"""What the state's events have in common: how an update, a plan, a release and a channel move, and what may not.

In: one event and what it says of a record. Out: changed records, every change remembered so that it can be taken back.
Errors: JournalConflict for a move that does not fit.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any, TypeVar

from central.journal.events import Event, JournalConflict
from central.journal.queries import Records
from central.journal.records import (
    ChannelChange,
    ForgetRecord,
    PlanRecord,
    ReleaseRecord,
    ReleaseStateName,
    UpdateRecord,
    UpdateStateName,
    VerdictRecord,
)
from central.journal.undo import Changes
from protos.manifest import ReleaseManifest, sha256_hex

V = TypeVar("V")

REVOKED = "its node was revoked"
"""Why the updates of a revoked node are set aside."""


class Transitions(Records):
    """The moves; events use them."""

    def __init__(self) -> None:
        super().__init__()
        self._changes = Changes()

    def _point(self, event: Event, channel: str, release_id: str | None, by: str) -> None:
        key = (event.cohort, channel)
        if release_id is None:
            self._changes.drop(self.channels, key)
        else:
            self._changes.put(self.channels, key, release_id)
        change = ChannelChange(channel, release_id, by, event.at, event.sequence)
        self._changes.append(self.channel_changes, key, change)

    def _cancel_plan_of(self, event: Event, update_id: str, reason: str = "") -> None:
        # A plan that loses an update stands for something else than its candidate: its other updates wait again.
        update = known(event, self.updates, update_id, "update")
        if update.state == "planned" and update.plan_id is not None:
            why = f"update {update.update_id[:8]} was taken away{': ' if reason else ''}{reason}"
            self._cancel(event, self.plans[update.plan_id], why, requeue=True)

    def _cancel(self, event: Event, plan: PlanRecord, why: str, requeue: bool) -> None:
        self._put_plan(replace(plan, decided=True))
        if plan.plan.removal is not None:  # the order stands: it is planned anew, on the head that there is then
            order = self.forgets[plan.plan.removal.order]
            self._put_order(replace(order, state="ordered", plan_id=None))
        label = f"plan {plan.plan_id[:8]}"
        if plan.candidate is not None:
            release = self.releases[plan.candidate]
            label = release.manifest.label
            verdict = VerdictRecord(False, f"cancelled: {why}", {}, {}, event.at)
            self._changes.put(self.releases, plan.candidate, replace(release, state="rejected", verdict=verdict))
        self._release_updates(event, [update.update_id for update in plan.plan.updates], ("planned",), requeue, label)

    def _cancel_built_on(self, event: Event, gone: Collection[str], how: str, requeue: bool) -> None:
        """Cancel the plans that build on releases which are `gone`."""
        for plan in self.open_plans(event.cohort):
            if plan.plan.parent in gone:
                self._cancel(event, plan, f"its parent was {how}", requeue)
        # In cohorts that build on this one: such a composition is not worth an evaluation. A merge of updates keeps its base.
        for plan in [plan for cohort in self.builds_on for plan in self.open_plans(cohort)]:
            if plan.plan.builds_on in gone and not plan.plan.updates and plan.plan.removal is None:
                self._cancel(event, plan, f"the release that it builds on was {how}", requeue)

    def _release_updates(
        self, event: Event, update_ids: Iterable[str], origins: tuple[UpdateStateName, ...], requeue: bool, label: str
    ) -> None:
        for update_id in update_ids:
            node = self.nodes[self.updates[update_id].manifest.node_id]
            if not requeue:
                self._move(event, update_id, "set_aside", origins, f"{label} was rolled back")
            elif node.revoked:
                self._move(event, update_id, "set_aside", origins, REVOKED)
            elif node.quarantine:
                self._move(event, update_id, "quarantined", origins, node.quarantine)
            else:
                self._move(event, update_id, "waiting", origins)

    def _is_merged_in(self, update_id: str, release_id: str) -> bool:
        """A withdrawn release may have lost its updates before: to another release, or because they were forgotten."""
        update = self.updates[update_id]
        return (update.state, update.release_id) == ("merged", release_id)

    def _move(
        self,
        event: Event,
        update_id: str,
        state: UpdateStateName,
        origins: tuple[UpdateStateName, ...],
        reason: str = "",
        plan_id: str | None = None,
    ) -> None:
        update = known(event, self.updates, update_id, "update")
        if update.state not in origins or update.cohort != event.cohort:
            raise conflict(
                event, f"update {update_id} of cohort {update.cohort!r} is {update.state}, not {' or '.join(origins)}"
            )
        held = state in ("merged", "set_aside")
        self._put_update(
            replace(
                update,
                state=state,
                reason=reason,
                since=event.at,
                plan_id=plan_id or (update.plan_id if held else None),
                release_id=update.release_id if held else None,
                lost=False,
            )
        )

    def _put_plan(self, record: PlanRecord) -> None:
        self._changes.put(self.plans, record.plan_id, record)
        self._list(self._open_plans, record.plan.cohort, record.plan_id, not record.decided)

    def _put_order(self, record: ForgetRecord) -> None:
        self._changes.put(self.forgets, record.order_id, record)
        moved = self._list(
            self._pending_forgets, record.cohort, record.order_id, record.state in ("ordered", "planned")
        )
        for update_id in record.updates if moved else ():
            key = (record.cohort, self.updates[update_id].manifest.payload.digest_sha256)
            self._changes.put(self._ordered_payloads, key, self._ordered_payloads.get(key, 0) + moved)

    def _list(self, index: dict[str, tuple[str, ...]], key: str, item: str, wanted: bool) -> int:
        """Let `index[key]` have the item or not; 1 when it came, -1 when it went, 0 when it was so."""
        listed = index.get(key, ())
        if wanted == (item in listed):
            return 0
        self._changes.put(index, key, (*listed, item) if wanted else tuple(other for other in listed if other != item))
        return 1 if wanted else -1

    def _put_update(self, record: UpdateRecord) -> None:
        before = self.updates.get(record.update_id)
        self._count_kept(record, self.takes_of_quota(record) - (before is not None and self.takes_of_quota(before)))
        if record.state == "forgotten":
            key = (record.cohort, record.manifest.payload.digest_sha256)
            self._changes.put(self.forgotten_payloads, key, record.update_id)
        self._changes.put(self.updates, record.update_id, record)
        waiting = self._waiting.setdefault(record.cohort, {})
        if record.state == "waiting":
            self._changes.put(waiting, record.update_id, record)
        elif record.update_id in waiting:
            self._changes.drop(waiting, record.update_id)

    def _count_kept(self, update: UpdateRecord, moved: int) -> None:
        """The update takes of its node's quota from now on (1), no longer (-1), or as before (0)."""
        if moved:
            node_id = update.manifest.node_id
            now = self.kept_bytes(node_id) + moved * update.manifest.payload.size_bytes
            self._changes.put(self._kept_bytes, node_id, now)

    def _add_release(self, event: Event, state: ReleaseStateName, plan_id: str | None) -> ReleaseRecord:
        self._expect_new(event, self.releases)
        data = event.body["manifest"].encode()
        manifest = ReleaseManifest.from_bytes(data)
        if sha256_hex(data) != event.subject or manifest.cohort != event.cohort:
            raise conflict(event, f"its manifest has digest {sha256_hex(data)} and cohort {manifest.cohort!r}")
        record = ReleaseRecord(
            release_id=event.subject,
            manifest=manifest,
            manifest_bytes=data,
            signature=base64.b64decode(event.body["signature"]),
            cohort=event.cohort,
            state=state,
            sequence=event.sequence,
            plan_id=plan_id,
            server_state=event.body.get("server_state"),
        )
        self._changes.put(self.releases, event.subject, record)
        return record

    def _expect_new(self, event: Event, records: dict[str, Any]) -> None:
        if event.subject in records:
            raise conflict(event, f"{event.subject} exists already")

    def _expect_accepted(self, event: Event, release_id: str) -> ReleaseRecord:
        release = known(event, self.releases, release_id, "release")
        if release.state != "accepted" or release.cohort != event.cohort:
            raise conflict(event, f"release {release_id} is {release.state} in cohort {release.cohort!r}, not accepted")
        return release


def conflict(event: Event, text: str) -> JournalConflict:
    return JournalConflict(f"Event {event.kind} of {event.subject or event.cohort} does not fit the journal: {text}.")


def known(event: Event, records: dict[str, V], key: str, noun: str) -> V:
    if key not in records:
        raise conflict(event, f"{noun} {key!r} is not known")
    return records[key]
