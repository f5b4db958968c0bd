"""The state: what the events so far imply. The only derived truth at central.

In: events, one by one. Out: records by id, and answers that follow from them. Guarantees: an event
is checked against the state as it is applied, and raises JournalConflict when it does not fit.
Every change since `mark` can be undone, so that a group of events is applied whole or not at all.
Replaying the same events gives the same state.

What an event does stands with its noun: a function with `@applies(EventKind....)` in this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from central.journal.events import FIRST_HASH, Event, EventKind
from central.journal.isolation import Isolation
from central.journal.records import (
    CanaryReport,
    ChannelChange,
    CollectedBlob,
    EvaluationRecord,
    ForgetRecord,
    PlanRecord,
    ReleaseRecord,
    ServedPeriod,
    TrainOfferRecord,
    UpdateRecord,
)
from central.journal.state.changes import Changes
from central.journal.state.slices import (
    Evaluations,
    Forgets,
    Nodes,
    Plans,
    Releases,
    Serving,
    Tokens,
    Updates,
)

HANDLERS: dict[EventKind, Callable[[State, Event], None]] = {}
"""What each kind of event does; filled by `applies`."""


def applies(
    kind: EventKind,
) -> Callable[[Callable[[State, Event], None]], Callable[[State, Event], None]]:
    """Register a function as what events of this kind do to the state."""

    def register(handler: Callable[[State, Event], None]) -> Callable[[State, Event], None]:
        if kind in HANDLERS:
            raise RuntimeError(
                f"Event kind {kind.value!r} has two handlers: {HANDLERS[kind].__qualname__} and "
                f"{handler.__qualname__}. Expected one; remove the other."
            )
        HANDLERS[kind] = handler
        return handler

    return register


def expect_all_handled() -> None:
    """Raises RuntimeError when a kind of event has no handler."""
    if missing := [kind.value for kind in EventKind if kind not in HANDLERS]:
        raise RuntimeError(
            f"No handler for the event kinds {', '.join(missing)}. Expected a function with "
            "@applies(EventKind....) for each, in central/journal/state/."
        )


class State:
    """Records that change through `apply` alone; treat dictionaries and lists as read-only."""

    def __init__(self) -> None:
        self.changes = Changes()
        """How handlers change what is not in a slice with a `put` of its own."""
        self.sequence = 0
        self.last_hash = FIRST_HASH
        self.collected: dict[str, CollectedBlob] = {}
        self.collections: dict[str, tuple[str, ...]] = {}
        """Digests of collections that are not finished, by id."""
        self.tokens = Tokens(self.changes)
        self.nodes = Nodes(self.changes)
        self.updates = Updates(self.changes, self.collected)
        self.plans = Plans(self.changes)
        self.evaluations = Evaluations(self.changes)
        self.forgets = Forgets(self.changes, self.updates)
        self.releases = Releases(self.changes)
        self.channels: dict[tuple[str, str], str] = {}
        self.channel_changes: dict[tuple[str, str], list[ChannelChange]] = {}
        self.canary_reports: dict[str, list[CanaryReport]] = {}
        self.train_offers: dict[str, TrainOfferRecord] = {}
        self.builds_on: dict[str, str] = {}
        """The cohort that a cohort builds on; cohorts that build on none are not in it."""
        self.compositions: dict[tuple[str, str], str] = {}
        """Plans without updates by (parent, release of the other cohort that they compose)."""
        self.isolations: dict[str, Isolation] = {}
        self.served: dict[str, list[ServedPeriod]] = {}
        """All periods by release, those that ended too."""
        self.serving = Serving(self.changes, self.served)

    def apply(self, event: Event) -> None:
        """Take over one event; raises JournalConflict when it does not fit.

        It may leave changes then; `rollback` undoes them.
        """
        HANDLERS[event.kind](self, event)
        self.changes.assign(self, "sequence", event.sequence)
        self.changes.assign(self, "last_hash", event.hash)

    def mark(self) -> None:
        """Forget how to undo what was done so far."""
        self.changes.forget()

    def rollback(self) -> None:
        """Undo everything since `mark`."""
        self.changes.undo()

    def cohorts(self) -> list[str]:
        """Cohorts in the order of their creation."""
        return list(self.releases.first)

    def genesis(self, cohort: str) -> ReleaseRecord:
        """Version 0 of the cohort; KeyError when there is no such cohort."""
        return self.releases[self.releases.first[cohort]]

    def head(self, cohort: str, channel: str = "stable") -> ReleaseRecord | None:
        """Release that the channel points at, if any."""
        release_id = self.channels.get((cohort, channel))
        return None if release_id is None else self.releases[release_id]

    def soaking(self, cohort: str) -> ReleaseRecord | None:
        """The cohort's canary while stable has not reached it; nothing is merged meanwhile."""
        canary, stable = self.head(cohort, "canary"), self.head(cohort)
        if canary is None or stable is None or canary.release_id == stable.release_id:
            return None
        return canary if self.descends(canary, stable) else None

    def descends(self, release: ReleaseRecord, ancestor: ReleaseRecord) -> bool:
        """Whether `ancestor` is in the release's line; every release is in its own."""
        while (
            release.manifest.version > ancestor.manifest.version
            and release.manifest.parent is not None
        ):
            release = self.releases[release.manifest.parent]
        return release.release_id == ancestor.release_id

    def base_of(self, release: ReleaseRecord) -> ReleaseRecord | None:
        """The release of the other cohort that this one is composed with.

        Version 0 stands on version 0.
        """
        if release.cohort not in self.builds_on:
            return None
        composition = release.manifest.composition
        return (
            self.releases[composition.builds_on]
            if composition
            else self.genesis(self.builds_on[release.cohort])
        )

    def waiting(self, cohort: str) -> list[UpdateRecord]:
        """The cohort's waiting updates in admission order."""
        return sorted(
            self.updates.waiting.get(cohort, {}).values(),
            key=lambda update: update.admitted_sequence,
        )

    def updates_from(self, node_id: str, start: str) -> list[UpdateRecord]:
        """The node's admitted updates that were trained on release `start`, in admission order."""
        return [
            self.updates[update_id] for update_id in self.updates.by_start.get((node_id, start), ())
        ]

    def open_plans(self, cohort: str) -> list[PlanRecord]:
        """Plans of the cohort without a verdict, oldest first."""
        return [self.plans[plan_id] for plan_id in self.plans.open.get(cohort, ())]

    def offers_of(self, candidate: str) -> list[EvaluationRecord]:
        """The candidate's evaluation offers, oldest first."""
        return [
            self.evaluations[offer_id]
            for offer_id in self.evaluations.by_candidate.get(candidate, ())
        ]

    def members(self, cohort: str) -> list[str]:
        """Nodes of the cohort that are not revoked, in the order of their enrolment."""
        return [
            node_id
            for node_id in self.nodes.by_cohort.get(cohort, ())
            if not self.nodes[node_id].revoked
        ]

    def suspects(self, cohort: str) -> list[UpdateRecord]:
        """The updates to be tried next, alone, in admission order; empty without a search.

        Updates that were superseded, revoked or set aside meanwhile are no longer suspects
        (isolation.py).
        """
        isolation = self.isolations.get(cohort)
        for group in isolation.groups if isolation else ():
            if waiting := [
                self.updates[update_id]
                for update_id in group
                if self.updates[update_id].state == "waiting"
            ]:
                return sorted(waiting, key=lambda update: update.admitted_sequence)
        return []

    def kept_bytes(self, node_id: str) -> int:
        """Bytes of the node's updates that its quota counts."""
        return self.updates.kept_bytes.get(node_id, 0)

    def updates_of(self, node_id: str) -> list[UpdateRecord]:
        """The node's admitted updates in admission order."""
        return [self.updates[update_id] for update_id in self.updates.by_node.get(node_id, ())]

    def removed(self, release: ReleaseRecord) -> list[str]:
        """The updates that the release's own merge took out of its parent."""
        removal = self.plans[release.plan_id].plan.removal if release.plan_id else None
        return [update.update_id for update in removal.updates] if removal else []

    def contributions(self, release_id: str) -> list[str]:
        """The updates that the release and its ancestors hold, oldest merge first.

        What was taken out is not among them.
        """
        held: dict[str, None] = {}
        for release in reversed(self.lineage(release_id)):
            held.update(dict.fromkeys(release.manifest.updates))
            for update_id in self.removed(release):
                held.pop(update_id, None)
        return list(held)

    def holders(self, cohort: str, update_ids: Collection[str]) -> dict[str, frozenset[str]]:
        """Which of the updates each release and candidate of the cohort holds.

        Releases that hold none of them are left out.
        """
        wanted, found = frozenset(update_ids), dict[str, frozenset[str]]()
        for release in self.releases.values():  # a parent is recorded before its children
            if release.cohort == cohort:
                own = wanted.intersection(release.manifest.updates)
                before = found.get(release.manifest.parent or "", frozenset())
                if held := (before | own).difference(self.removed(release) if before else ()):
                    found[release.release_id] = held
        return found

    def forgotten_in(self, release_id: str) -> list[str]:
        """Forgotten updates that the release still holds, oldest merge first.

        It holds them itself, or in the release that it is composed with.
        """
        base = self.base_of(self.releases[release_id])
        holding = [
            held
            for held in (release_id, *((base.release_id,) if base else ()))
            if self.has_forgotten(held)
        ]
        held = (update_id for holder in holding for update_id in self.contributions(holder))
        return [update_id for update_id in held if self.updates[update_id].state == "forgotten"]

    def is_forgotten_payload(self, cohort: str, digest: str) -> bool:
        """Whether an update of the cohort with these bytes is forgotten, or ordered to be."""
        return (
            cohort,
            digest,
        ) in self.updates.forgotten_payloads or self.forgets.ordered_payloads.get(
            (cohort, digest), 0
        ) > 0

    def has_forgotten(self, release_id: str) -> bool:
        """Whether the release's own product holds something forgotten.

        Nothing reads such a product any more to build another.
        """
        return release_id in self.releases.holding_forgotten

    def pending_forgets(self, cohort: str) -> list[ForgetRecord]:
        """Orders whose removal is not released yet, oldest first."""
        return [self.forgets[order_id] for order_id in self.forgets.pending.get(cohort, ())]

    def lineage(self, release_id: str) -> list[ReleaseRecord]:
        """The release and its ancestors down to version 0."""
        found = [self.releases[release_id]]
        while (parent := found[-1].manifest.parent) is not None:
            found.append(self.releases[parent])
        return found
