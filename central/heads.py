"""The journal's end, kept outside of its database, where a rollback of the database cannot reach.

In: the number and hash of the last event, central's release key. Out: the signed head in two
places: the file `journal.head` in the data directory, and the note `head` beside the blobs.

Guarantees: when `Journal.append` returns, the file is on disk (`keep`). The blob store follows
within `COPY_S` and at every stop (`copy`). A kill in between leaves a head behind the journal,
never before it.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from central import faults
from central.blobs import BlobStore
from central.disk import storage, write_file
from central.errors import StorageError
from central.journal import Journal
from central.journal.head import Head, sign_head
from lorikeet.durable import TEMPORARY_SUFFIX
from protos.manifest import ManifestError

log = logging.getLogger(__name__)

FILE, NOTE = "journal.head", "head"
FILE_BYTES = 512
"""The file never changes its size and is overwritten in place.

A disk writes its one sector whole or not at all.
"""
READS = 3
COPY_S = 10.0
"""Pause between two copies to the blob store, where a write may cost a request."""


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
        """Write the head to the file.

        When a disk refuses, that is logged once. The head stays behind until the disk takes it
        again.
        """
        self._last = head
        try:
            self._write(_bytes_of(head))
            self._failing = False
        except (OSError, StorageError) as error:
            if not self._failing:
                log.error(
                    "the journal's head is not kept",
                    extra={"path": str(self._path), "detail": str(error)},
                )
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
    """The heads by the place where each is kept; raises StorageError for an unreadable one."""
    path = data_dir / FILE
    found: dict[str, Head] = {}
    with storage(path):
        if path.is_file():
            found[str(path)] = _read_file(path)
    if (note := store.read_note(NOTE)) is not None:
        found[store.note_where(NOTE)] = _read(store.note_where(NOTE), note)
    return found


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
            f"The journal's head at {where} is damaged: {error} Expected what central wrote there. "
            "Remove it: the journal is then checked against the other copy of the head."
        ) from error
