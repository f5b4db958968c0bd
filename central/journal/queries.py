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
    """Records by id; treat the dictionaries as read-only."""

    def __init__(self) -> None:
        self.sequence = 0
        self.last_hash = FIRST_HASH
        self.tokens: dict[str, TokenRecord] = {}
        self.nodes: dict[str, NodeRecord] = {}
        self.updates: dict[str, UpdateRecord] = {}
        self.plans: dict[str, PlanRecord] = {}
        self.releases: dict[str, ReleaseRecord] = {}
        self.channels: dict[tuple[str, str], str] = {}
        self.channel_changes: dict[tuple[str, str], tuple[ChannelChange, ...]] = {}
        self.train_offers: dict[str, TrainOfferRecord] = {}
        self.builds_on: dict[str, str] = {}
        """The cohort that a cohort builds on; cohorts that build on none are not in it."""
        self.compositions: dict[tuple[str, str], str] = {}
        """Plans without updates by (parent, release of the other cohort that it was to be composed with)."""
        self.canary_reports: dict[str, tuple[CanaryReport, ...]] = {}
        self.evaluations: dict[str, EvaluationRecord] = {}
        self.isolations: dict[str, Isolation] = {}
        self.forgets: dict[str, ForgetRecord] = {}
        self.serving: dict[str, ServedPeriod] = {}
        self.served: dict[str, tuple[ServedPeriod, ...]] = {}
        self.forgotten_payloads: dict[tuple[str, str], str] = {}
        """Forgotten update by cohort and digest of its payload."""
        self.collected: dict[str, CollectedBlob] = {}
        self.collections: dict[str, tuple[str, ...]] = {}
        self._genesis: dict[str, str] = {}
        self._waiting: dict[str, dict[str, UpdateRecord]] = {}
        self._by_start: dict[tuple[str, str], tuple[str, ...]] = {}
        self._kept_bytes: dict[str, int] = {}

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
        return [record for record in self.plans.values() if record.plan.cohort == cohort and not record.decided]

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
        """Bytes of the node's updates that wait or are in quarantine: what its quota counts."""
        return self._kept_bytes.get(node_id, 0)

    def updates_of(self, node_id: str) -> list[UpdateRecord]:
        """The node's admitted updates in admission order."""
        return [update for update in self.updates.values() if update.manifest.node_id == node_id]

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
        held = [*self.contributions(release_id), *(self.contributions(base.release_id) if base else ())]
        return [update_id for update_id in held if self.updates[update_id].state == "forgotten"]

    def is_forgotten_payload(self, cohort: str, digest: str) -> bool:
        """Whether an update of the cohort with just these bytes is forgotten, or is ordered to be."""
        ordered = (update_id for order in self.pending_forgets(cohort) for update_id in order.updates)
        return (cohort, digest) in self.forgotten_payloads or any(
            self.updates[update_id].manifest.payload.digest_sha256 == digest for update_id in ordered
        )

    def has_forgotten(self, release_id: str) -> bool:
        """Whether the release's own product holds something forgotten: nothing reads it any more to build another."""
        return any(self.updates[update_id].state == "forgotten" for update_id in self.contributions(release_id))

    def pending_forgets(self, cohort: str) -> list[ForgetRecord]:
        """Orders whose removal is not released yet, oldest first."""
        return [o for o in self.forgets.values() if o.cohort == cohort and o.state in ("ordered", "planned")]

    def lineage(self, release_id: str) -> list[ReleaseRecord]:
        """The release and its ancestors down to version 0."""
        found = [self.releases[release_id]]
        while (parent := found[-1].manifest.parent) is not None:
            found.append(self.releases[parent])
        return found
