"""What the state holds and what can be asked of it.

In: nothing; `State` (state.py) fills it from events. Out: records by id, and what follows from them.
"""

from __future__ import annotations

from collections.abc import Collection

from central.journal.events import FIRST_HASH
from central.journal.isolation import Isolation
from central.journal.records import (
    CanaryReport,
    ChannelChange,
    CollectedBlob,
    EvaluationRecord,
    ForgetRecord,
    NodeRecord,
    PlanRecord,
    ReleaseRecord,
    ServedPeriod,
    TokenRecord,
    TrainOfferRecord,
    UpdateRecord,
)


class Records:
    """Records by id; treat dictionaries and lists as read-only."""

    def __init__(self) -> None:
        self.sequence = 0
        self.last_hash = FIRST_HASH
        self.tokens: dict[str, TokenRecord] = {}
        self.nodes: dict[str, NodeRecord] = {}
        self.updates: dict[str, UpdateRecord] = {}
        self.plans: dict[str, PlanRecord] = {}
        self.releases: dict[str, ReleaseRecord] = {}
        self.channels: dict[tuple[str, str], str] = {}
        self.channel_changes: dict[tuple[str, str], list[ChannelChange]] = {}
        self.train_offers: dict[str, TrainOfferRecord] = {}
        self.builds_on: dict[str, str] = {}
        """The cohort that a cohort builds on; cohorts that build on none are not in it."""
        self.compositions: dict[tuple[str, str], str] = {}
        """Plans without updates by (parent, release of the other cohort that it was to be composed with)."""
        self.canary_reports: dict[str, list[CanaryReport]] = {}
        self.evaluations: dict[str, EvaluationRecord] = {}
        self.isolations: dict[str, Isolation] = {}
        self.forgets: dict[str, ForgetRecord] = {}
        self.serving: dict[str, ServedPeriod] = {}
        self.served: dict[str, list[ServedPeriod]] = {}
        self.forgotten_payloads: dict[tuple[str, str], str] = {}
        """Forgotten update by cohort and digest of its payload."""
        self.collected: dict[str, CollectedBlob] = {}
        self.collections: dict[str, tuple[str, ...]] = {}
        self._genesis: dict[str, str] = {}
        # Indexes: what is asked at every append, wake-up or call costs the same after years. Each is what a scan of the records above
        # would find (tests/unit/central/journal/test_indexes.py). Tuples where what leaves must come back in its place.
        self._waiting: dict[str, dict[str, UpdateRecord]] = {}
        self._by_start: dict[tuple[str, str], list[str]] = {}
        self._by_node: dict[str, list[str]] = {}
        self._by_payload: dict[str, list[str]] = {}
        self._kept_bytes: dict[str, int] = {}
        self._members: dict[str, list[str]] = {}
        self._open_plans: dict[str, tuple[str, ...]] = {}
        self._offers: dict[str, tuple[str, ...]] = {}
        self._pending_forgets: dict[str, tuple[str, ...]] = {}
        self._ordered_payloads: dict[tuple[str, str], int] = {}
        self._holding_forgotten: dict[str, None] = {}
        self._served_at: dict[str, int] = {}

    def cohorts(self) -> list[str]:
        """Cohorts in the order of their creation."""
        return list(self._genesis)

    def genesis(self, cohort: str) -> ReleaseRecord:
        """Version 0 of the cohort; KeyError when there is no such cohort."""
        return self.releases[self._genesis[cohort]]

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
        while release.manifest.version > ancestor.manifest.version and release.manifest.parent is not None:
            release = self.releases[release.manifest.parent]
        return release.release_id == ancestor.release_id

    def base_of(self, release: ReleaseRecord) -> ReleaseRecord | None:
        """The release of the other cohort that this one is composed with; version 0 stands on version 0."""
        if release.cohort not in self.builds_on:
            return None
        composition = release.manifest.composition
        return self.releases[composition.builds_on] if composition else self.genesis(self.builds_on[release.cohort])

    def waiting(self, cohort: str) -> list[UpdateRecord]:
        """The cohort's waiting updates in admission order."""
        return sorted(self._waiting.get(cohort, {}).values(), key=lambda update: update.admitted_sequence)

    def updates_from(self, node_id: str, start: str) -> list[UpdateRecord]:
        """The node's admitted updates that were trained on release `start`, in admission order."""
        return [self.updates[update_id] for update_id in self._by_start.get((node_id, start), ())]

    def open_plans(self, cohort: str) -> list[PlanRecord]:
        """Plans of the cohort without a verdict, oldest first."""
        return [self.plans[plan_id] for plan_id in self._open_plans.get(cohort, ())]

    def offers_of(self, candidate: str) -> list[EvaluationRecord]:
        """The candidate's evaluation offers, oldest first."""
        return [self.evaluations[offer_id] for offer_id in self._offers.get(candidate, ())]

    def members(self, cohort: str) -> list[str]:
        """Nodes of the cohort that are not revoked, in the order of their enrolment."""
        return [node_id for node_id in self._members.get(cohort, ()) if not self.nodes[node_id].revoked]

    def suspects(self, cohort: str) -> list[UpdateRecord]:
        """The updates to be tried next, without others, in admission order; empty when no search goes on (isolation.py).

        Updates that were superseded, revoked or set aside meanwhile are no longer suspects.
        """
        isolation = self.isolations.get(cohort)
        for group in isolation.groups if isolation else ():
            if waiting := [
                self.updates[update_id] for update_id in group if self.updates[update_id].state == "waiting"
            ]:
                return sorted(waiting, key=lambda update: update.admitted_sequence)
        return []

    def kept_bytes(self, node_id: str) -> int:
        """Bytes of the node's updates that its quota counts."""
        return self._kept_bytes.get(node_id, 0)

    def takes_of_quota(self, update: UpdateRecord) -> bool:
        """Whether its payload is on disk and no release's: what is merged is the cohort's, and kept for as long as its releases."""
        return (
            update.state != "merged" and not update.lost and update.manifest.payload.digest_sha256 not in self.collected
        )

    def updates_of(self, node_id: str) -> list[UpdateRecord]:
        """The node's admitted updates in admission order."""
        return [self.updates[update_id] for update_id in self._by_node.get(node_id, ())]

    def removed(self, release: ReleaseRecord) -> list[str]:
        """The updates that the release's own merge took out of its parent."""
        removal = self.plans[release.plan_id].plan.removal if release.plan_id else None
        return [update.update_id for update in removal.updates] if removal else []

    def contributions(self, release_id: str) -> list[str]:
        """The updates that the release holds, its ancestors' included and without what was taken out, oldest merge first."""
        held: dict[str, None] = {}
        for release in reversed(self.lineage(release_id)):
            held.update(dict.fromkeys(release.manifest.updates))
            for update_id in self.removed(release):
                held.pop(update_id, None)
        return list(held)

    def holders(self, cohort: str, update_ids: Collection[str]) -> dict[str, frozenset[str]]:
        """Which of the updates each release and candidate of the cohort holds; releases without any are left out."""
        wanted, found = frozenset(update_ids), dict[str, frozenset[str]]()
        for release in self.releases.values():  # a parent is recorded before its children
            if release.cohort == cohort:
                own = wanted.intersection(release.manifest.updates)
                before = found.get(release.manifest.parent or "", frozenset())
                if held := (before | own).difference(self.removed(release) if before else ()):
                    found[release.release_id] = held
        return found

    def forgotten_in(self, release_id: str) -> list[str]:
        """Forgotten updates that the release still holds, itself or in what it is composed with; oldest merge first."""
        base = self.base_of(self.releases[release_id])
        holding = [held for held in (release_id, *((base.release_id,) if base else ())) if self.has_forgotten(held)]
        held = (update_id for holder in holding for update_id in self.contributions(holder))
        return [update_id for update_id in held if self.updates[update_id].state == "forgotten"]

    def is_forgotten_payload(self, cohort: str, digest: str) -> bool:
        """Whether an update of the cohort with just these bytes is forgotten, or is ordered to be."""
        return (cohort, digest) in self.forgotten_payloads or self._ordered_payloads.get((cohort, digest), 0) > 0

    def has_forgotten(self, release_id: str) -> bool:
        """Whether the release's own product holds something forgotten: nothing reads it any more to build another."""
        return release_id in self._holding_forgotten

    def pending_forgets(self, cohort: str) -> list[ForgetRecord]:
        """Orders whose removal is not released yet, oldest first."""
        return [self.forgets[order_id] for order_id in self._pending_forgets.get(cohort, ())]

    def lineage(self, release_id: str) -> list[ReleaseRecord]:
        """The release and its ancestors down to version 0."""
        found = [self.releases[release_id]]
        while (parent := found[-1].manifest.parent) is not None:
            found.append(self.releases[parent])
        return found
