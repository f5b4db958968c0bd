"""The journal's end, kept where a rollback of its database does not reach, and the check of a journal against it.

In: the journal's events, central's release key. Out: the signed head in two places - the file `journal.head` in the data directory and
the note `head` beside the blobs - and what is missing of a journal that ends before one of them.

Guarantees: what `Journal.append` returned for is in the file, on disk (`keep`); the blob store follows within `COPY_S` and at every stop
(`copy`). A kill between the two leaves a head behind the journal, never before it. A journal is whole when it holds the event of every
head under the same hash and its last event bears central's seal.
"""

from __future__ import annotations

import base64
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from central import faults
from central.durable import TEMPORARY_SUFFIX, storage, write_file
from central.errors import StorageError
from central.journal import Event, EventKind, Journal, JournalCorrupt, State, count_events, verify_journal
from central.journal.events import FIRST_HASH
from central.journal.head import Head, sign_head, verify_seal
from central.journal.payloads import stored_blobs
from central.registry import BlobStore
from protos.manifest import ManifestError, UpdateManifest, verify

log = logging.getLogger(__name__)

FILE, NOTE = "journal.head", "head"
FILE_BYTES = 512
"""The file never changes its size: it is overwritten in place, one sector that a disk writes whole or not at all."""
READS = 3
COPY_S = 10.0
"""Pause between two copies to the blob store, where a write may cost a request."""
PUBLIC_KEY = "release.pub.pem"


WAY_BACK = (
    "Put the newest journal back, or restore the newest backup (`central restore`). To go on without the missing events for good: "
    "`central journal accept-loss`."
)


class JournalLost(StorageError):
    """The journal lacks events that central recorded, or has others in their place; `head` is what it should hold, if known."""

    def __init__(self, what: str, head: Head | None = None) -> None:
        super().__init__(f"{what} {WAY_BACK}")
        self.what = what
        self.head = head


class Heads:
    """Signs and keeps the journal's head; one per central that writes."""

    def __init__(self, data_dir: Path, store: BlobStore, key: ec.EllipticCurvePrivateKey) -> None:
        self._path = data_dir / FILE
        self._store = store
        self._key = key
        self._last: Head | None = None
        self._copied: Head | None = None
        self._failing = False
        self._copying = threading.Lock()

    def seal(self, sequence: int, digest: str) -> Head:
        """The signed head for an event."""
        return sign_head(self._key, sequence, digest)

    def keep(self, head: Head) -> None:
        """Write the head to the file. A disk that refuses is logged, once: the head stays behind until it takes it again."""
        self._last = head
        try:
            self._write(_bytes_of(head))
            self._failing = False
        except (OSError, StorageError) as error:
            if not self._failing:
                log.error("the journal's head is not kept", extra={"path": str(self._path), "detail": str(error)})
            self._failing = True
        faults.reach("head.kept")

    def start(self, journal: Journal) -> None:
        """Keep the head of a journal that was found whole, in both places; raises StorageError."""
        with journal.read() as state:
            self._last = self._copied = self.seal(state.sequence, state.last_hash)
            keep_head(self._path.parent, self._store, self._last)

    def copy(self) -> None:
        """Write the newest head beside the blobs, unless it is there; raises StorageError."""
        with self._copying:
            if (head := self._last) is not None and head != self._copied:
                self._store.write_note(NOTE, head.to_bytes())
                self._copied = head
                faults.reach("head.copied")

    def run(self, stop: threading.Event) -> None:
        """Copy every `COPY_S` until `stop` is set."""
        while not stop.wait(COPY_S):
            try:
                self.copy()
            except StorageError as error:  # the store may be back next time
                log.error("the journal's head is not copied", extra={"detail": str(error)})

    def _write(self, data: bytes) -> None:
        try:
            descriptor = os.open(self._path, os.O_WRONLY)
        except FileNotFoundError:
            write_file(self._path, data)
            return
        try:
            os.pwrite(descriptor, data, 0)
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)


def keep_head(data_dir: Path, store: BlobStore, head: Head) -> None:
    """Write the head to both places, whatever was there; raises StorageError."""
    with storage(data_dir):
        for stale in data_dir.glob(f"{FILE}.*{TEMPORARY_SUFFIX}"):
            stale.unlink()
    write_file(data_dir / FILE, _bytes_of(head))
    store.write_note(NOTE, head.to_bytes())
    faults.reach("head.copied")


def kept_heads(data_dir: Path, store: BlobStore) -> dict[str, Head]:
    """The heads by the place where each is kept; raises StorageError for one that cannot be read."""
    path = data_dir / FILE
    found: dict[str, Head] = {}
    with storage(path):
        if path.is_file():
            found[str(path)] = _read_file(path)
    if (note := store.read_note(NOTE)) is not None:
        found[store.note_where(NOTE)] = _read(store.note_where(NOTE), note)
    return found


def expect_whole(
    heads: Mapping[str, Head],
    hash_at: Callable[[int], str | None],
    last: Event | None,
    public_key_pem: bytes,
) -> None:
    """Raises JournalLost when the journal does not hold the event of every head, JournalCorrupt when its end is not central's own.

    `hash_at` gives the hash of the event with a number, None when there is none; `last` is the journal's last event.
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
    """Re-read the journal on disk, as verify_journal, and check its end against the heads; returns its state.

    `also` is called with every event. `signatures` checks also every seal, and every signature of a node or of central that an event holds. Writes nothing and needs no
    running central, but may run beside one. Raises StorageError, JournalLost or JournalCorrupt.
    """
    heads = kept_heads(data_dir, store)  # first: a journal that central writes meanwhile is ahead of them
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


def expect_history(journal: Journal, heads: Mapping[str, Head], data_dir: Path, store: BlobStore, key: bytes) -> None:
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
    """Blobs that no event names, in order. Beside a running central: also those whose event is about to come."""
    return sorted(set(store.digests()) - stored_blobs(state).keys() - state.collected.keys())


def read_public_key(data_dir: Path) -> bytes:
    """The key that verifies what central signed; raises StorageError."""
    path = data_dir / "pki" / PUBLIC_KEY
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageError(
            f"The key that releases are signed with cannot be read: {error.strerror} ({path}). Set CENTRAL_DATA_DIR to the "
            "directory that central serves from."
        ) from error


def _bytes_of(head: Head) -> bytes:
    return head.to_bytes().ljust(FILE_BYTES)


def _read_file(path: Path) -> Head:
    """A central that runs may be overwriting it: what looks damaged is read again."""
    for _ in range(READS - 1):
        with suppress(StorageError):
            return _read(str(path), path.read_bytes())
    return _read(str(path), path.read_bytes())


def _read(where: str, data: bytes) -> Head:
    try:
        return Head.from_bytes(data.rstrip(b" "))
    except ManifestError as error:
        raise StorageError(
            f"The journal's head at {where} is damaged: {error} Expected what central wrote there. Remove it: the journal is then "
            "checked against the other copy of the head."
        ) from error


def _expect_own(where: str, head: Head, public_key_pem: bytes) -> None:
    try:
        verify_seal(public_key_pem, head.sequence, head.hash, head.seal)
    except ManifestError as error:
        raise JournalCorrupt(
            f"The journal's head at {where} (event {head.sequence}) is not signed by this central's release.key. If pki/ holds the "
            "keys of another central, restore its own from a backup. If the head was altered, remove it: the journal is then checked "
            "against the other copy of the head."
        ) from error


def expect_sealed(last: Event, public_key_pem: bytes) -> None:
    """Raises JournalCorrupt unless central signed the journal's last event, and so everything before it."""
    try:
        verify_seal(public_key_pem, last.sequence, last.hash, last.seal)
    except ManifestError as error:
        raise JournalCorrupt(
            f"Journal event {last.sequence} ({last.kind}), the last one, is not signed by this central's release.key. The journal was "
            "rewritten, or cut off by hand, or belongs to another central. Restore it from a backup."
        ) from error


def _difference(where: str, head: Head, end: int, found: str | None) -> str:
    if found is None:
        missing = (
            f"Event {head.sequence} is" if head.sequence == end + 1 else f"Events {end + 1} to {head.sequence} are"
        )
        has = f"ends with event {end}" if end else "has no events"
        return (
            f"The journal {has}, but central recorded event {head.sequence} (the head in {where}). {missing} missing; nodes were "
            "told that what is in them is safe."
        )
    return (
        f"Event {head.sequence} of the journal has hash {found[:12]}; central recorded it as {head.hash[:12]} (the head in {where}). "
        f"This is another journal, or an older one that went on: what was recorded up to event {head.sequence} may be missing."
    )


def _without_heads(data_dir: Path, store: BlobStore, sequence: int) -> JournalLost:
    has = f"ends with event {sequence}" if sequence else "has no events, though the blob store has blobs"
    return JournalLost(
        f"The journal {has}, and no head of it is kept: neither {data_dir / FILE} nor {store.note_where(NOTE)} is there, so nobody can "
        "say whether events are missing."
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
            data = body["manifest"].encode()
            node = state.nodes[UpdateManifest.from_bytes(data).node_id]
            verify(node.public_key_pem.encode(), data, base64.b64decode(body["signature"]))
        elif event.kind in (EventKind.COHORT_CREATED, EventKind.CANDIDATE_BUILT):
            verify(central_key, body["manifest"].encode(), base64.b64decode(body["signature"]))
    except (ManifestError, ValueError, KeyError) as error:
        raise JournalCorrupt(
            f"Journal event {event.sequence} ({event.kind} of {event.subject}) holds a signature that does not fit: {error} It was "
            "altered; restore the journal from a backup."
        ) from error
