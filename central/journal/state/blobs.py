"""Events of blobs that retention collects, and of a loss that an operator accepted.

Guarantee: an event that names a blob again takes it out of the collected ones in the same step.
Whoever deletes under the journal's lock what is still marked never deletes what is named.
"""

from __future__ import annotations

from central.journal.events import Event, EventKind
from central.journal.records import CollectedBlob
from central.journal.state.expect import conflict
from central.journal.state.state import State, applies


@applies(EventKind.BLOBS_COLLECTED)
def blobs_collected(state: State, event: Event) -> None:
    blobs = event.body["blobs"]
    if event.subject in state.collections or not blobs:
        raise conflict(
            event, f"{len(blobs)} blobs, collection known: {event.subject in state.collections}"
        )
    for blob in blobs:
        digest = blob["digest"]
        if digest in state.collected:
            raise conflict(event, f"blob {digest} was collected already")
        record = CollectedBlob(digest, blob["size_bytes"], blob["reason"], event.subject, event.at)
        state.updates.count_payload(digest, -1)
        state.changes.put(state.collected, digest, record)
    state.changes.put(state.collections, event.subject, tuple(blob["digest"] for blob in blobs))


@applies(EventKind.COLLECTION_FINISHED)
def collection_finished(state: State, event: Event) -> None:
    if event.subject not in state.collections:
        raise conflict(event, "there is no such unfinished collection")
    state.changes.drop(state.collections, event.subject)


@applies(EventKind.JOURNAL_LOSS_ACCEPTED)
def journal_loss_accepted(state: State, event: Event) -> None:
    """The state does not change; the event is for the record."""
