"""The SQLite file of the experience store: its tables, transactions and queries.

In: a path. Out: an open handle. Guarantees: every write is one durable transaction (WAL,
synchronous=FULL), safe with several processes on the same file; a file that earlier software wrote
gets the tables that it lacks.
"""

from __future__ import annotations

import sqlite3
import threading
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_node.errors import StorageError

SCHEMA_VERSION = 3
BUSY_TIMEOUT_S = 30
SCHEMA = """
CREATE TABLE interactions (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    finish_reason TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_ids BLOB NOT NULL, answer_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL,
    interaction_id TEXT NOT NULL REFERENCES interactions (id), score REAL, correction TEXT,
    comment TEXT, correction_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE INDEX feedback_of_interaction ON feedback (interaction_id, number);
"""
# Version 3 adds these four. choices: all of an interaction with several, the first one included.
# comparisons: feedback on several answers; the newest of a subject counts. deleted: interactions
# that were deleted and cannot come back. users: of the access keys that asked.
ADDED = """
CREATE TABLE choices (
    interaction_id TEXT NOT NULL REFERENCES interactions (id), position INTEGER NOT NULL,
    answer_ids BLOB NOT NULL, logprobs BLOB NOT NULL, PRIMARY KEY (interaction_id, position)
) WITHOUT ROWID;
CREATE TABLE comparisons (
    number INTEGER PRIMARY KEY REFERENCES feedback (number), kind TEXT NOT NULL,
    subject TEXT NOT NULL, said TEXT NOT NULL
);
CREATE INDEX comparisons_of_subject ON comparisons (kind, subject, number);
CREATE TABLE deleted (id TEXT PRIMARY KEY, at TEXT NOT NULL);
CREATE TABLE users (
    interaction_id TEXT PRIMARY KEY REFERENCES interactions (id), user TEXT NOT NULL
) WITHOUT ROWID;
"""


class Database:
    """One open handle on the file; threads may share it, each process opens its own."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.execute("PRAGMA secure_delete=ON")
            self._create_schema()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"Experience store {path} cannot be opened: {error}. Check that EDGE_DATA_DIR is "
                "writable and has space."
            ) from error

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    def cursor(self) -> int:
        """Number of the newest feedback; 0 when there is none."""
        return self._count("SELECT COALESCE(MAX(number), 0) FROM feedback")

    def _create_schema(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # without the write lock: a process that hangs may hold it
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            missing = {0: SCHEMA + ADDED, 2: ADDED, SCHEMA_VERSION: ""}.get(version)
            if missing is None:
                raise StorageError(
                    f"Experience store {self._path} has schema {version}; this software reads "
                    f"schemas 2 and {SCHEMA_VERSION}. Use the software that wrote it, or move the "
                    "file away to start afresh."
                )
            for statement in missing.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                # Takes the write lock at once: a read that becomes a write cannot wait for another.
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._storage_error(error) from error

    def _query(self, statement: str, values: Any = ()) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(statement, values).fetchall()
            except sqlite3.Error as error:
                raise self._storage_error(error) from error

    def _count(self, statement: str, values: Any = ()) -> int:
        return int(self._query(statement, values)[0][0])

    def _storage_error(self, error: sqlite3.Error) -> StorageError:
        return StorageError(
            f"Experience store {self._path} failed: {error}. Check space and permissions of "
            "EDGE_DATA_DIR."
        )


TOKEN_BYTES = array("I").itemsize


def pack(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


def unpack(packed: bytes) -> tuple[int, ...]:
    return tuple(array("I", packed))


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """float32: they were computed as such."""
    return array("f", logprobs).tobytes()


def unpack_logprobs(packed: bytes) -> tuple[float, ...]:
    return tuple(array("f", packed))
