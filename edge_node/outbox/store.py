"""The outbox: finished updates on their way to central, and what became of the others.

In: a round's manifest, signature and payload. Out: OutboxEntry records and payload files. One
SQLite file (WAL, synchronous=FULL) and one file per payload, written before its record. Several
processes open the same outbox: the learner adds; the uploader and the operator's commands advance
states, each by one guarded transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Literal

from edge_node.disk import write_file
from edge_node.errors import StorageError
from protos.manifest import UpdateManifest, sha256_hex

_SCHEMA = """
CREATE TABLE IF NOT EXISTS updates (
    sequence INTEGER PRIMARY KEY,
    update_id TEXT NOT NULL UNIQUE,
    round_id TEXT NOT NULL UNIQUE,
    start_release TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL DEFAULT '',
    manifest BLOB NOT NULL,
    signature BLOB NOT NULL,
    receipt BLOB,
    receipt_signature BLOB,
    created_at TEXT NOT NULL,
    changed_at TEXT NOT NULL
)
"""
_COLUMNS = "sequence, update_id, round_id, start_release, state, reason, created_at, changed_at"


class OutboxState(StrEnum):
    HELD = "held"
    """Waits for a human's approval."""
    WAITING = "waiting"
    """May leave; central has not acknowledged it."""
    ADMITTED = "admitted"
    """Central holds it; its signed receipt is kept."""
    REFUSED = "refused"
    """Central refused it for good; `reason` is central's."""
    REJECTED = "rejected"
    """A human here decided that it stays."""


@dataclass(frozen=True)
class OutboxEntry:
    """One update, without its bytes: see `Outbox.signed` and `Outbox.payload_path`."""

    sequence: int
    update_id: str
    round_id: str
    start_release: str
    state: OutboxState
    reason: str
    created_at: str
    changed_at: str


class Outbox:
    """Owner of `outbox/` in the data directory; every method is one durable transaction."""

    def __init__(
        self, path: Path, approval: Literal["auto", "manual"], *, busy_timeout_s: float = 30
    ) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        self._payloads = path / "payloads"
        self._first_state = OutboxState.HELD if approval == "manual" else OutboxState.WAITING
        try:
            self._payloads.mkdir(parents=True, exist_ok=True)
            with self._transaction() as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"Cannot open the outbox in {path}: {error}. EDGE_DATA_DIR must be a writable "
                "directory with free space."
            ) from error

    def add(self, round_id: str, manifest: bytes, signature: bytes, payload: bytes) -> str:
        """Keep a finished round's update, return its id; a round there keeps its first update.

        Raises:
            ValueError: manifest, round and payload do not belong together.
            StorageError: it cannot be written.
        """
        document = UpdateManifest.from_bytes(manifest)
        update_id = sha256_hex(manifest)
        if document.round_id != round_id or document.payload.digest_sha256 != sha256_hex(payload):
            raise ValueError(
                f"Update {update_id[:12]} of round {document.round_id!r} was added for round "
                f"{round_id!r} with payload {sha256_hex(payload)[:12]}; its manifest names "
                f"payload {document.payload.digest_sha256[:12]}."
            )
        known = self.of_round(round_id)
        if known is not None:
            return known.update_id
        self._write_payload(round_id, payload)
        now = _now()
        with self._transaction() as database:
            database.execute(
                "INSERT OR IGNORE INTO updates (sequence, update_id, round_id, start_release, "
                "state, manifest, signature, created_at, changed_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    document.sequence, update_id, round_id, document.start.release,
                    self._first_state, manifest, signature, document.created_at, now,
                ),
            )  # fmt: skip
        entry = self.of_round(round_id)
        if entry is None:
            raise ValueError(
                f"Sequence {document.sequence} is taken by another round; use next_sequence()."
            )
        return entry.update_id

    def next_sequence(self) -> int:
        """The sequence of the node's next update; 1 for the first."""
        with self._transaction() as database:
            return int(
                database.execute("SELECT COALESCE(MAX(sequence), 0) + 1 FROM updates").fetchone()[0]
            )

    def list(self, *states: OutboxState) -> Sequence[OutboxEntry]:
        """Entries in one of `states` (all when none is given), oldest first."""
        marks = ", ".join("?" * len(states))
        return self._select(f"WHERE state IN ({marks})" if states else "", *states)

    def get(self, update_id: str) -> OutboxEntry | None:
        return self._one("update_id = ?", update_id)

    def of_round(self, round_id: str) -> OutboxEntry | None:
        """The update that a round left here, if it did."""
        return self._one("round_id = ?", round_id)

    def last_for_start(self, release_id: str) -> OutboxEntry | None:
        """The newest update from that start that central has or may get: a round supersedes it."""
        found = self._select(
            "WHERE start_release = ? AND state IN ('held', 'waiting', 'admitted')", release_id
        )  # refused and rejected ones never arrive, so there is nothing to supersede
        return found[-1] if found else None

    def refused_last(self) -> OutboxEntry | None:
        """The newest update that central decided on, when it refused that one."""
        newest = "(SELECT MAX(sequence) FROM updates WHERE state IN ('admitted', 'refused'))"
        found = self._select(f"WHERE state = 'refused' AND sequence = {newest}")
        return found[0] if found else None

    def signed(self, update_id: str) -> tuple[bytes, bytes]:
        """Manifest and signature, as they were signed."""
        return self._bytes("manifest, signature", update_id)

    def receipt(self, update_id: str) -> tuple[bytes, bytes]:
        """Central's ReceiptBody and its signature; raises LookupError before admission."""
        return self._bytes("receipt, receipt_signature", update_id)

    def payload_path(self, round_id: str) -> Path:
        """Where a round's payload is until it is acknowledged, refused or rejected."""
        return self._payloads / f"{round_id}.safetensors"

    def approve(self, update_id: str) -> None:
        """A person lets a held update leave; raises LookupError, ValueError if it is not held."""
        self._advance(update_id, OutboxState.WAITING, "", OutboxState.HELD)

    def reject(self, update_id: str, reason: str = "rejected by the operator of this node") -> None:
        """A person keeps a held update here; raises LookupError, ValueError if it is not held."""
        self._advance(update_id, OutboxState.REJECTED, reason, OutboxState.HELD)

    def mark_admitted(self, update_id: str, receipt: bytes, signature: bytes) -> None:
        """Keep central's verified receipt; after that the payload is not needed here."""
        with self._transaction() as database:
            database.execute(
                "UPDATE updates SET receipt = ?, receipt_signature = ? WHERE update_id = ?",
                (receipt, signature, update_id),
            )
            _advance(database, update_id, OutboxState.ADMITTED, "", OutboxState.WAITING)
        self._drop_payload(update_id)

    def mark_refused(self, update_id: str, reason: str) -> None:
        """Central refused it for good."""
        self._advance(update_id, OutboxState.REFUSED, reason, OutboxState.WAITING)

    def _advance(self, update_id: str, to: OutboxState, reason: str, expected: OutboxState) -> None:
        with self._transaction() as database:
            _advance(database, update_id, to, reason, expected)
        if to in (OutboxState.REFUSED, OutboxState.REJECTED):
            self._drop_payload(update_id)

    def _drop_payload(self, update_id: str) -> None:
        entry = self.get(update_id)
        if entry is not None:
            self.payload_path(entry.round_id).unlink(missing_ok=True)

    def _bytes(self, columns: str, update_id: str) -> tuple[bytes, bytes]:
        with self._transaction() as database:
            row = database.execute(
                f"SELECT {columns} FROM updates WHERE update_id = ?", (update_id,)
            ).fetchone()
        if row is None or row[0] is None:
            raise LookupError(f"The outbox holds no {columns} of update {update_id!r}.")
        return row[0], row[1]

    def _write_payload(self, round_id: str, payload: bytes) -> None:
        write_file(self.payload_path(round_id), payload)

    def _one(self, where: str, *values: str) -> OutboxEntry | None:
        found = self._select(f"WHERE {where}", *values)
        return found[0] if found else None

    def _select(self, clause: str, *values: str) -> Sequence[OutboxEntry]:
        with self._transaction() as database:
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM updates {clause} ORDER BY sequence", values
            ).fetchall()
        return [
            OutboxEntry(row[0], row[1], row[2], row[3], OutboxState(row[4]), row[5], row[6], row[7])
            for row in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # A connection per transaction: several threads and processes come a few times a minute.
        database = sqlite3.connect(self._path / "outbox.db", timeout=self._busy_timeout_s)
        try:
            database.execute("PRAGMA synchronous=FULL")
            with database:
                yield database
        finally:
            database.close()


def _advance(
    database: sqlite3.Connection,
    update_id: str,
    to: OutboxState,
    reason: str,
    expected: OutboxState,
) -> None:
    changed = database.execute(
        "UPDATE updates SET state = ?, reason = ?, changed_at = ? WHERE update_id = ? AND state = "
        "?",
        (to, reason, _now(), update_id, expected),
    ).rowcount
    if changed:
        return
    row = database.execute("SELECT state FROM updates WHERE update_id = ?", (update_id,)).fetchone()
    if row is None:
        raise LookupError(
            f"No update {update_id!r} in the outbox. `edge-node outbox list` shows every id."
        )
    raise ValueError(
        f"Update {update_id[:12]} is {row[0]}; only an update that is {expected} can become {to}."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
