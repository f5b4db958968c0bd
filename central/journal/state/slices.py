"""One slice of the state per noun: its records by id, and the indexes that go with them.

In: records, from the handlers of events. Out: the same records, by id and by what is asked often.
Guarantees: a slice keeps its indexes whenever a record of it is put, through the undo log. So what
is asked at every append, wake-up or call costs the same after years. Each index is what a scan of
the records would find (tests/unit/central/journal/test_indexes.py).

A slice is read like any dictionary. Only handlers write to it, with `put`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from central.journal.records import (
    CollectedBlob,
    EvaluationRecord,
    ForgetRecord,
    NodeRecord,
    PlanRecord,
    ReleaseRecord,
    ServedPeriod,
    TokenRecord,
    UpdateRecord,
)
from central.journal.state.changes import Changes

V = TypeVar("V")


class Slice(dict[str, V]):
    """Records by id; changes go through the undo log."""

    def __init__(self, changes: Changes) -> None:
        super().__init__()
        self._changes = changes


class Tokens(Slice[TokenRecord]):
    """Join tokens by id."""

    def put(self, record: TokenRecord) -> None:
        self._changes.put(self, record.token_id, record)


class Nodes(Slice[NodeRecord]):
    """Nodes by id, revoked ones too."""

    def __init__(self, changes: Changes) -> None:
        super().__init__(changes)
        self.by_cohort: dict[str, list[str]] = {}
        """In the order of their enrolment."""

    def put(self, record: NodeRecord) -> None:
        if record.node_id not in self:
            self._changes.append(self.by_cohort, record.cohort, record.node_id)
        self._changes.put(self, record.node_id, record)


class Updates(Slice[UpdateRecord]):
    """Admitted updates by id, and what each node's quota counts."""

    def __init__(self, changes: Changes, collected: Mapping[str, CollectedBlob]) -> None:
        super().__init__(changes)
        self._collected = collected
        self.waiting: dict[str, dict[str, UpdateRecord]] = {}
        """By cohort and id."""
        self.by_node: dict[str, list[str]] = {}
        self.by_start: dict[tuple[str, str], list[str]] = {}
        """By node and the release that they were trained on; lists are in admission order."""
        self.kept_bytes: dict[str, int] = {}
        """By node."""
        self.forgotten_payloads: dict[tuple[str, str], str] = {}
        """Forgotten update by cohort and digest of its payload."""
        self.numbers: dict[tuple[str, str], int] = {}
        """How many by cohort and state."""
        self._by_payload: dict[str, list[str]] = {}

    def put(self, record: UpdateRecord) -> None:
        before = self.get(record.update_id)
        if before is None:
            self._list_new(record)
        counted = before is not None and self.takes_of_quota(before)
        self._count(record, self.takes_of_quota(record) - counted)
        if record.state == "forgotten":
            key = (record.cohort, record.manifest.payload.digest_sha256)
            self._changes.put(self.forgotten_payloads, key, record.update_id)
        if before is not None:
            self._changes.count(self.numbers, (before.cohort, before.state), -1)
        self._changes.count(self.numbers, (record.cohort, record.state), 1)
        self._changes.put(self, record.update_id, record)
        waiting = self.waiting.setdefault(record.cohort, {})
        if record.state == "waiting":
            self._changes.put(waiting, record.update_id, record)
        elif record.update_id in waiting:
            self._changes.drop(waiting, record.update_id)

    def takes_of_quota(self, update: UpdateRecord) -> bool:
        """Whether its payload is on disk and no release's.

        What is merged is the cohort's, and kept for as long as its releases.
        """
        return (
            update.state != "merged"
            and not update.lost
            and update.manifest.payload.digest_sha256 not in self._collected
        )

    def may_come_again(self, update: UpdateRecord) -> bool:
        """Whether its payload was lost, and retention has not given it up since."""
        return update.lost and update.manifest.payload.digest_sha256 not in self._collected

    def count_payload(self, digest: str, moved: int) -> None:
        """The payload counts in the quotas of those who sent it (1), or no longer (-1)."""
        for update_id in self._by_payload.get(digest, ()):
            update = self[update_id]
            if self.takes_of_quota(update):
                self._count(update, moved)

    def _list_new(self, record: UpdateRecord) -> None:
        manifest, update_id = record.manifest, record.update_id
        self._changes.append(self._by_payload, manifest.payload.digest_sha256, update_id)
        self._changes.append(self.by_start, (manifest.node_id, manifest.start.release), update_id)
        self._changes.append(self.by_node, manifest.node_id, update_id)

    def _count(self, update: UpdateRecord, moved: int) -> None:
        if moved:
            node_id = update.manifest.node_id
            now = self.kept_bytes.get(node_id, 0) + moved * update.manifest.payload.size_bytes
            self._changes.put(self.kept_bytes, node_id, now)


class Plans(Slice[PlanRecord]):
    """Planned merges by id."""

    def __init__(self, changes: Changes) -> None:
        super().__init__(changes)
        self.open: dict[str, tuple[str, ...]] = {}
        """Plans without a verdict by cohort, oldest first."""

    def put(self, record: PlanRecord) -> None:
        self._changes.put(self, record.plan_id, record)
        self._changes.list_in(self.open, record.plan.cohort, record.plan_id, not record.decided)


class Releases(Slice[ReleaseRecord]):
    """Candidates and releases by id."""

    def __init__(self, changes: Changes) -> None:
        super().__init__(changes)
        self.first: dict[str, str] = {}
        """Version 0 by cohort, in the order of the cohorts' creation."""
        self.holding_forgotten: dict[str, None] = {}
        """Those whose own product holds something forgotten."""
        self.numbers: dict[tuple[str, str], int] = {}
        """How many by cohort and state."""
        self.verdicts: dict[tuple[str, bool], int] = {}
        """How many by cohort and whether it was accepted."""

    def put(self, record: ReleaseRecord) -> None:
        before = self.get(record.release_id)
        if before is not None:
            self._changes.count(self.numbers, (before.cohort, before.state), -1)
        self._changes.count(self.numbers, (record.cohort, record.state), 1)
        if record.verdict is not None and (before is None or before.verdict is None):
            self._changes.count(self.verdicts, (record.cohort, record.verdict.accepted), 1)
        self._changes.put(self, record.release_id, record)

    def put_first(self, record: ReleaseRecord) -> None:
        self._changes.put(self.first, record.cohort, record.release_id)

    def mark_forgotten(self, release_id: str) -> None:
        self._changes.put(self.holding_forgotten, release_id, None)


class Evaluations(Slice[EvaluationRecord]):
    """Evaluation offers by id."""

    def __init__(self, changes: Changes) -> None:
        super().__init__(changes)
        self.by_candidate: dict[str, tuple[str, ...]] = {}
        """Oldest first."""

    def put(self, record: EvaluationRecord) -> None:
        self._changes.put(self, record.offer_id, record)
        self._changes.list_in(self.by_candidate, record.candidate, record.offer_id, True)


class Forgets(Slice[ForgetRecord]):
    """Orders to forget by id."""

    def __init__(self, changes: Changes, updates: Mapping[str, UpdateRecord]) -> None:
        super().__init__(changes)
        self._updates = updates
        self.pending: dict[str, tuple[str, ...]] = {}
        """Orders whose removal is not released yet by cohort, oldest first."""
        self.ordered_payloads: dict[tuple[str, str], int] = {}
        """How many updates of pending orders have a payload, by cohort and digest."""

    def put(self, record: ForgetRecord) -> None:
        self._changes.put(self, record.order_id, record)
        pending = record.state in ("ordered", "planned")
        moved = self._changes.list_in(self.pending, record.cohort, record.order_id, pending)
        for update_id in record.updates if moved else ():
            key = (record.cohort, self._updates[update_id].manifest.payload.digest_sha256)
            self._changes.put(self.ordered_payloads, key, self.ordered_payloads.get(key, 0) + moved)


class Serving(Slice[ServedPeriod]):
    """What each node says that it serves now, by node."""

    def __init__(self, changes: Changes, served: dict[str, list[ServedPeriod]]) -> None:
        super().__init__(changes)
        self._served = served
        self._place: dict[str, int] = {}
        """Where a node's present period is in its release's list."""

    def begin(self, period: ServedPeriod) -> None:
        """The node serves this from now on; what it served before ends."""
        node_id, release_id = period.node_id, period.release_id
        if before := self.get(node_id):
            ended = replace(before, until=period.since)
            self._changes.replace(self._served[before.release_id], self._place[node_id], ended)
        self._changes.put(self._place, node_id, len(self._served.get(release_id, ())))
        self._changes.append(self._served, release_id, period)
        self._changes.put(self, node_id, period)
