"""Collects blobs that nothing needs.

In: the policy. Out: events that say which blobs went and why, and a store without them. Guarantees:
the event is durable before the first blob is deleted, so that a blob that is gone is always
explained; what a kill left undeleted is deleted at the next start or run. Both the choice and each
deletion are made under the journal's lock, and whoever names a blob in an event makes sure under
the same lock that it is there (Admission, Registry), so a concurrent upload or merge never loses
its blob. On a full disk the events are written into the room of the ballast (central/space.py).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from central import faults
from central.blobs import BlobStore
from central.errors import CentralError, StorageError, StorageFull
from central.intake.uploads import Uploads
from central.journal import EventKind, Journal, NewEvent, State
from central.retention.retention import Collectable, collectable, superseded
from central.settings import RetentionSettings
from central.space import Space
from protos.manifest import canonical_json, sha256_hex

log = logging.getLogger(__name__)

BLOBS_PER_EVENT = 1000
DAY_S = 24 * 3600.0
ROOM = "central, to make room"
"""Who collected the blobs that went before their days were over."""
ROOM_PAUSE_S = 10.0
"""Pause after a look that found nothing to collect on a nearly full disk."""


@dataclass(frozen=True)
class Collection:
    """What went, or would go."""

    blobs: tuple[Collectable, ...]
    uploads: int
    """Unfinished uploads that no node goes on with."""
    upload_bytes: int

    @property
    def size_bytes(self) -> int:
        return sum(blob.size_bytes for blob in self.blobs) + self.upload_bytes


class Collector:
    """One per central; thread-safe; every method blocks."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        uploads: Uploads,
        policy: RetentionSettings,
        clock: Callable[[], datetime] | None = None,
        space: Space | None = None,
    ) -> None:
        """`space`: its ballast is given back when the disk is full. None: there is none."""
        self._journal = journal
        self._blobs = blobs
        self._uploads = uploads
        self._policy = policy
        self._clock = clock or journal.now
        self._space = space
        self._one_at_a_time = threading.Lock()
        self._tried_at = -math.inf

    def preview(self) -> Collection:
        """What `collect` would take now."""
        with self._journal.read() as state:
            found = collectable(state, self._clock(), self._policy)
        count, size_bytes = self._uploads.stale(self._policy.uploads_days * DAY_S, drop=False)
        return Collection(tuple(map(self._sized, found)), count, size_bytes)

    def collect(self, by: str) -> Collection:
        """Collect what may go. Raises StorageError when the store refuses; the next run goes on."""
        taken = self._collect(by, lambda state: collectable(state, self._clock(), self._policy))
        count, size_bytes = self._uploads.stale(self._policy.uploads_days * DAY_S, drop=True)
        if taken or count:
            log.info("blobs collected", extra={"blobs": len(taken), "uploads": count, "by": by})
        return Collection(tuple(taken), count, size_bytes)

    def make_room(self, node_id: str | None) -> bool:
        """Collect what never merges before its days are over; whether something went.

        Of one node whose quota is used up, or (None) of all because a disk is nearly full. Raises
        StorageError.
        """
        if node_id is None and time.monotonic() - self._tried_at < ROOM_PAUSE_S:
            return False  # every upload that is refused asks
        taken = self._collect(ROOM, lambda state: superseded(state, node_id))
        count = 0
        if node_id is None:
            count, _ = self._uploads.stale(DAY_S, drop=True)
            self._tried_at = -math.inf if taken or count else time.monotonic()
        if taken or count:
            fields = {"node_id": node_id, "blobs": len(taken), "uploads": count}
            log.warning("room made before its time", extra=fields)
        return bool(taken or count)

    def recover(self) -> None:
        """Finish a collection that a kill cut off, and delete stale uploads; at central's start."""
        with self._one_at_a_time:
            self._finish()
        self._uploads.stale(self._policy.uploads_days * DAY_S, drop=True)

    def run(self, stop: threading.Event) -> None:
        """Collect every `every_hours` until `stop` is set; returns at once when it is not set."""
        if self._policy.every_hours is None:
            return
        while not stop.wait(self._policy.every_hours * 3600.0):
            try:
                self.collect("retention")
            except (
                CentralError
            ):  # the disk may be back next time; a merge or an upload would say so too
                log.exception(
                    "retention failed; it tries again",
                    extra={"every_hours": self._policy.every_hours},
                )

    def _collect(
        self, by: str, choose: Callable[[State], Sequence[Collectable]]
    ) -> list[Collectable]:
        """Delete what `choose` finds, a part at a time.

        So a full disk has to take only one event before it has room.
        """
        taken: list[Collectable] = []
        with self._one_at_a_time:
            try:
                self._finish()
                while found := self._record(by, choose):
                    taken += found
                    self._finish()
            finally:
                if self._space is not None:
                    self._space.take_ballast()
        return taken

    def _record(
        self, by: str, choose: Callable[[State], Sequence[Collectable]]
    ) -> list[Collectable]:
        with self._journal.read() as state:
            found = [self._sized(blob) for blob in choose(state)[:BLOBS_PER_EVENT]]
            if not found:
                return []
            body = {"blobs": [dict(vars(blob)) for blob in found], "by": by}
            subject = sha256_hex(canonical_json({"after": state.sequence, **body}))
            self._append(NewEvent(EventKind.BLOBS_COLLECTED, subject=subject, body=body))
            return found

    def _append(self, event: NewEvent) -> None:
        """Record on a full disk, in the room of the ballast."""
        try:
            self._journal.append(event)
        except StorageFull:
            if self._space is None:
                raise
            log.warning("disk full: the ballast is given back", extra={"kind": event.kind})
            self._space.release_ballast()
            self._journal.append(event)

    def _finish(self) -> None:
        with self._journal.read() as state:
            unfinished = dict(state.collections)
        for collection_id, digests in unfinished.items():
            for digest in digests:
                with self._journal.read() as state:
                    if _is_marked(state, digest, collection_id):
                        self._blobs.delete(digest)
                faults.reach("retention.deleted")
            self._append(NewEvent(EventKind.COLLECTION_FINISHED, subject=collection_id))

    def _sized(self, blob: Collectable) -> Collectable:
        """The journal does not name the size of every blob."""
        if blob.size_bytes:
            return blob
        try:
            return replace(blob, size_bytes=self._blobs.size(blob.digest))
        except StorageError:  # it is not there: then it takes no room either
            return blob


def _is_marked(state: State, digest: str, collection_id: str) -> bool:
    gone = state.collected.get(digest)
    return gone is not None and gone.collection_id == collection_id
