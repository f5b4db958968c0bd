"""Events about blobs that retention collects.

In: events. Out: which blobs are gone, or on their way, and why. Guarantee: an event that names a blob again takes it out of the
collected ones in the same step, so that whoever deletes under the journal's lock what is still marked never deletes what is named.
"""

from __future__ import annotations

from collections.abc import Iterable

from central.journal.events import Event
from central.journal.records import CollectedBlob, ReleaseRecord
from central.journal.transitions import Transitions, conflict


class Collections(Transitions):
    """What happens to blobs after nothing needs them."""

    def _blobs_collected(self, event: Event) -> None:
        blobs = event.body["blobs"]
        if event.subject in self.collections or not blobs:
            raise conflict(event, f"{len(blobs)} blobs, collection known: {event.subject in self.collections}")
        for blob in blobs:
            digest = blob["digest"]
            if digest in self.collected:
                raise conflict(event, f"blob {digest} was collected already")
            record = CollectedBlob(digest, blob["size_bytes"], blob["reason"], event.subject, event.at)
            self._count_kept_of(digest, -1)
            self._changes.put(self.collected, digest, record)
        self._changes.put(self.collections, event.subject, tuple(blob["digest"] for blob in blobs))

    def _collection_finished(self, event: Event) -> None:
        if event.subject not in self.collections:
            raise conflict(event, "there is no such unfinished collection")
        self._changes.drop(self.collections, event.subject)

    def _name_blobs_of(self, release: ReleaseRecord) -> None:
        manifest = release.manifest
        self._name_blobs((manifest.payload.digest_sha256, manifest.own_payload.digest_sha256, release.server_state))

    def _name_blobs(self, digests: Iterable[str | None]) -> None:
        """These blobs are there: an event names them."""
        for digest in digests:
            if digest is not None and digest in self.collected:
                self._changes.drop(self.collected, digest)
                self._count_kept_of(digest, 1)

    def _count_kept_of(self, digest: str, moved: int) -> None:
        """The payload with this digest takes of the quotas of those who sent it, or no longer."""
        for update_id in self._by_payload.get(digest, ()):
            update = self.updates[update_id]
            if self.takes_of_quota(update):
                self._count_kept(update, moved)
