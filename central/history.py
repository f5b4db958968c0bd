"""Whether a journal is whole: it ends where central left it, and central signed it.

In: the journal's events and its heads (heads.py). Out: nothing, or what is missing. A journal is
whole when it holds the event of every head under the same hash and its last event bears central's
seal; that one speaks for all events before it. A journal that is ahead of its heads is whole: a
kill came between its commit and the head.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path

from central.blobs import BlobStore
from central.errors import StorageError
from central.heads import FILE, NOTE, kept_heads
from central.journal import (
    Event,
    EventKind,
    Journal,
    JournalCorrupt,
    State,
    count_events,
    verify_journal,
)
from central.journal.events import FIRST_HASH
from central.journal.head import Head, verify_seal
from central.journal.payloads import stored_blobs
from protos.manifest import ManifestError, verify

PUBLIC_KEY = "release.pub.pem"


WAY_BACK = (
    "Put the newest journal back, or restore the newest backup (`central restore`). To go on "
    "without the missing events for good: `central journal accept-loss`."
)


class JournalLost(StorageError):
    """The journal lacks events that central recorded, or has others in their place.

    `head` is what it should hold, if known.
    """

    def __init__(self, what: str, head: Head | None = None) -> None:
        super().__init__(f"{what} {WAY_BACK}")
        self.what = what
        self.head = head


def expect_whole(
    heads: Mapping[str, Head],
    hash_at: Callable[[int], str | None],
    last: Event | None,
    public_key_pem: bytes,
) -> None:
    """Raises JournalLost when the journal does not hold the event of every head.

    Raises JournalCorrupt when its end is not central's own. `hash_at` gives the hash of the event
    with a number, None when there is none. `last` is the journal's last event.
    """
    for where, head in heads.items():
        _expect_own(where, head, public_key_pem)
    end = last.sequence if last else 0
    for where, head in sorted(heads.items(), key=lambda item: -item[1].sequence):
        found = FIRST_HASH if head.sequence == 0 else hash_at(head.sequence)
        if found != head.hash:
            raise JournalLost(_difference(where, head, end, found), head)
    if last is not None:
        expect_sealed(last, public_key_pem)


def verify_history(
    data_dir: Path,
    url: str,
    store: BlobStore,
    signatures: bool = False,
    also: Callable[[Event], None] = lambda event: None,
) -> State:
    """Re-read the journal on disk and check its end against the heads; returns its state.

    `also` is called with every event. `signatures` checks also every seal, and every signature of a
    node or of central that an event holds. Writes nothing and needs no running central, but may run
    beside one. Raises StorageError, JournalLost or JournalCorrupt.
    """
    heads = kept_heads(
        data_dir, store
    )  # first: a journal that central writes meanwhile is ahead of them
    expect_begun(url, heads, data_dir, store)
    key = b""
    wanted = {head.sequence for head in heads.values()}
    hashes: dict[int, str] = {}
    last: list[Event] = []

    def seen(event: Event, state: State) -> None:
        nonlocal key
        key = key or read_public_key(data_dir)
        last[:] = [event]
        also(event)
        if event.sequence in wanted:
            hashes[event.sequence] = event.hash
        if signatures:
            _check_signatures(event, state, key)

    state = verify_journal(url, seen)
    if not heads:
        raise _without_heads(data_dir, store, state.sequence)
    expect_whole(heads, hashes.get, last[0] if last else None, key or read_public_key(data_dir))
    return state


def expect_begun(url: str, heads: Mapping[str, Head], data_dir: Path, store: BlobStore) -> None:
    """Raises JournalLost for a database without events where a central had some; makes nothing."""
    if count_events(url):
        return
    if heads:
        expect_whole(heads, lambda sequence: None, None, read_public_key(data_dir))
    elif any(True for _ in store.digests()):
        raise _without_heads(data_dir, store, 0)


def expect_history(
    journal: Journal, heads: Mapping[str, Head], data_dir: Path, store: BlobStore, key: bytes
) -> None:
    """The same check of an open journal that has events, before central serves from it."""
    last = last_event(journal)
    if not heads and last is not None:
        raise _without_heads(data_dir, store, last.sequence)
    expect_whole(heads, lambda sequence: _hash_at(journal, sequence), last, key)


def last_event(journal: Journal) -> Event | None:
    """The event that the journal ends with; None when it has none."""
    with journal.read() as state:
        return next(iter(journal.events(state.sequence - 1, 1)), None) if state.sequence else None


def unnamed_blobs(state: State, store: BlobStore) -> list[str]:
    """Blobs that no event names, in order.

    Beside a running central these include blobs whose event is about to come.
    """
    return sorted(set(store.digests()) - stored_blobs(state).keys() - state.collected.keys())


def read_public_key(data_dir: Path) -> bytes:
    """The key that verifies what central signed; raises StorageError."""
    path = data_dir / "pki" / PUBLIC_KEY
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"The key that releases are signed with cannot be read: {error.strerror} ({path}). Set "
            "CENTRAL_DATA_DIR to the directory that central serves from."
        ) from error


def _expect_own(where: str, head: Head, public_key_pem: bytes) -> None:
    try:
        verify_seal(public_key_pem, head.sequence, head.hash, head.seal)
    except ManifestError as error:
        raise JournalCorrupt(
            f"The journal's head at {where} (event {head.sequence}) is not signed by this "
            "central's release.key. If pki/ holds the keys of another central, restore its own "
            "from a backup. If the head was altered, remove it: the journal is then checked "
            "against the other copy of the head."
        ) from error


def expect_sealed(last: Event, public_key_pem: bytes) -> None:
    """Raises JournalCorrupt unless central signed the last event, and so everything before it."""
    try:
        verify_seal(public_key_pem, last.sequence, last.hash, last.seal)
    except ManifestError as error:
        raise JournalCorrupt(
            f"Journal event {last.sequence} ({last.kind}), the last one, is not signed by this "
            "central's release.key. The journal was rewritten, or cut off by hand, or belongs to "
            "another central. Restore it from a backup."
        ) from error


def _difference(where: str, head: Head, end: int, found: str | None) -> str:
    if found is None:
        missing = (
            f"Event {head.sequence} is"
            if head.sequence == end + 1
            else f"Events {end + 1} to {head.sequence} are"
        )
        has = f"ends with event {end}" if end else "has no events"
        return (
            f"The journal {has}, but central recorded event {head.sequence} (the head in {where}). "
            f"{missing} missing; nodes were told that what is in them is safe."
        )
    return (
        f"Event {head.sequence} of the journal has hash {found[:12]}; central recorded it as "
        f"{head.hash[:12]} (the head in {where}). This is another journal, or an older one that "
        f"went on: what was recorded up to event {head.sequence} may be missing."
    )


def _without_heads(data_dir: Path, store: BlobStore, sequence: int) -> JournalLost:
    has = (
        f"ends with event {sequence}"
        if sequence
        else "has no events, though the blob store has blobs"
    )
    return JournalLost(
        f"The journal {has}, and no head of it is kept: neither {data_dir / FILE} nor "
        f"{store.note_where(NOTE)} is there, so nobody can say whether events are missing."
    )


def _hash_at(journal: Journal, sequence: int) -> str | None:
    found = journal.events(sequence - 1, 1)
    return found[0].hash if found else None


def _check_signatures(event: Event, state: State, central_key: bytes) -> None:
    """Of the event itself and of the document in it."""
    body = event.body
    try:
        if event.seal:
            verify_seal(central_key, event.sequence, event.hash, event.seal)
        if event.kind is EventKind.UPDATE_ADMITTED:
            node = state.nodes[state.updates[event.subject].manifest.node_id]
            signature = base64.b64decode(body["signature"])
            verify(node.public_key_pem.encode(), body["manifest"].encode(), signature)
        elif event.kind in (EventKind.COHORT_CREATED, EventKind.CANDIDATE_BUILT):
            verify(central_key, body["manifest"].encode(), base64.b64decode(body["signature"]))
    except (ManifestError, ValueError, KeyError) as error:
        raise JournalCorrupt(
            f"Journal event {event.sequence} ({event.kind} of {event.subject}) holds a signature "
            f"that does not fit: {error} It was altered; restore the journal from a backup."
        ) from error
