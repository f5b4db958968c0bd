"""How a backup looks on disk.

In: a directory, events. Out: the manifest, and events of journal.jsonl one by one. The format is
the same for every database, so a backup also moves a central from one to another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from central.disk import storage
from central.errors import StorageError
from central.journal import Event, EventKind, JournalCorrupt
from central.journal.stored import checked_chain
from protos.manifest import Digest, Document, ManifestError, canonical_json

BACKUPS, BLOBS = "backups", "blobs"
"""Names in a directory of backups."""
MANIFEST, JOURNAL, PKI = "manifest.json", "journal.jsonl", "pki"
"""Names in one backup."""


class BackupManifest(Document):
    """What a backup holds."""

    schema_version: Literal[1] = 1
    created_at: str
    software: str
    base: str
    """Digest of the base model; empty when there was no cohort yet."""
    events: int
    last_hash: str
    """Hash of the last event."""
    journal_sha256: Digest
    blobs: int
    blob_bytes: int
    pki: dict[str, Digest]
    """SHA-256 by file name."""
    has_keys: bool


def read_manifest(backup: Path) -> BackupManifest:
    """The manifest of a finished backup; raises StorageError."""
    path = backup / MANIFEST
    with storage(path):
        data = path.read_bytes()
    try:
        return BackupManifest.from_bytes(data)
    except ManifestError as error:
        raise StorageError(f"{path} was altered: {error} Restore another backup.") from error


def event_line(event: Event) -> bytes:
    """One line of journal.jsonl."""
    return (
        canonical_json({**vars(event), "kind": event.kind.value, "body": dict(event.body)}) + b"\n"
    )


def read_events(path: Path) -> Iterator[Event]:
    """The events of journal.jsonl, their chain checked.

    Raises StorageError naming the first bad one.
    """
    try:
        yield from checked_chain(_events(path))
    except JournalCorrupt as error:
        text = str(error).replace("Restore the journal from a backup.", "Restore another backup.")
        raise StorageError(f"{path} was altered: {text}") from error


def _events(path: Path) -> Iterator[Event]:
    with storage(path), path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                value: dict[str, Any] = json.loads(line)
                yield Event(**{**value, "kind": EventKind(value["kind"])})
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise StorageError(
                    f"{path} was altered, or written by newer software: line {number} is no event "
                    f"({error}). Restore another backup."
                ) from error
