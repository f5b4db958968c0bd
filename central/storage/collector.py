"""Collects blobs that nothing needs.

In: the policy. Out: events that say which blobs went and why, and a store without them. Guarantees: the event is durable before the
first blob is deleted, so that a blob that is gone is always explained; what a kill left undeleted is deleted at the next start or
run. Both the choice and each deletion are made under the journal's lock, and whoever names a blob in an event makes sure under the
same lock that it is there (Admission, Registry), so a concurrent upload or merge never loses its blob.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from central import faults
from central.errors import CentralError, StorageError
from central.intake.partial import PartialUploads
from central.journal import EventKind, Journal, NewEvent, State
from central.registry import BlobStore
from central.settings import RetentionSettings
from central.storage.retention import Collectable, collectable
from protos.manifest import canonical_json, sha256_hex

log = logging.getLogger(__name__)

BLOBS_PER_EVENT = 1000
DAY_S = 24 * 3600.0


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
        uploads: PartialUploads,
        policy: RetentionSettings,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._uploads = uploads
        self._policy = policy
        self._clock = clock or journal.now
        self._one_at_a_time = threading.Lock()

    def preview(self) -> Collection:
        """What `collect` would take now."""
        with self._journal.read() as state:
            found = collectable(state, self._clock(), self._policy)
        count, size_bytes = self._uploads.stale(self._policy.uploads_days * DAY_S, drop=False)
        return Collection(tuple(map(self._sized, found)), count, size_bytes)

    def collect(self, by: str) -> Collection:
        """Collect what may go; raises StorageError when the store refuses, and the next run goes on from there."""
        with self._one_at_a_time:
            self._finish()
            taken = self._record(by)
            self._finish()
        count, size_bytes = self._uploads.stale(self._policy.uploads_days * DAY_S, drop=True)
        if taken or count:
            log.info("blobs collected", extra={"blobs": len(taken), "uploads": count, "by": by})
        return Collection(tuple(taken), count, size_bytes)

    def recover(self) -> None:
        """Delete what a kill left of a recorded collection, and uploads that no node went on with; at the start of central."""
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
            except CentralError:  # the disk may be back next time; a merge or an upload would say so too
                log.exception("retention failed; it tries again", extra={"every_hours": self._policy.every_hours})

    def _record(self, by: str) -> list[Collectable]:
        with self._journal.read() as state:
            found = [self._sized(blob) for blob in collectable(state, self._clock(), self._policy)]
            events = []
            for begin in range(0, len(found), BLOBS_PER_EVENT):
                blobs = [dict(vars(blob)) for blob in found[begin : begin + BLOBS_PER_EVENT]]
                body = {"blobs": blobs, "by": by}
                subject = sha256_hex(canonical_json({"after": state.sequence, **body}))
                events.append(NewEvent(EventKind.BLOBS_COLLECTED, subject=subject, body=body))
            self._journal.append(*events)
            return found

    def _finish(self) -> None:
        with self._journal.read() as state:
            unfinished = dict(state.collections)
        for collection_id, digests in unfinished.items():
            for digest in digests:
                with self._journal.read() as state:
                    if _is_marked(state, digest, collection_id):
                        self._blobs.delete(digest)
                faults.reach("retention.deleted")
            self._journal.append(NewEvent(EventKind.COLLECTION_FINISHED, subject=collection_id))

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
