"""The SQLite file of the experience store: its transactions and queries.

In: a path. Out: an open handle. Guarantees: every write is one durable transaction (WAL,
synchronous=FULL), safe with several processes on the same file; a file that earlier software wrote
gets the tables that it lacks (schema.py). Texts, token ids and log-probabilities go in as `seal(?)`
and come out as `unseal(column)` (sealing.py); a file that another key sealed is not opened.
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
from edge_node.experience.schema import OLDEST, SCHEMA_VERSION, upgrade
from edge_node.experience.sealing import CLEAR, Sealing

BUSY_TIMEOUT_S = 30


class Database:
    """One open handle on the file; threads may share it, each process opens its own."""

    def __init__(
        self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S, sealing: Sealing = CLEAR
    ) -> None:
        self._path = path
        self._sealing = sealing
        self._has_keys = False
        self._unsealable: StorageError | None = None
        """Why the last value could not be unsealed: SQLite does not pass it on."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False
            )
            self._db.row_factory = sqlite3.Row
            if not path.stat().st_size:  # new: `free_disk` will need no copy of it
                self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._db.execute("PRAGMA secure_delete=ON")
            self._db.create_function("seal", 1, sealing.seal)
            self._db.create_function("unseal", 1, self._unseal)
            self._create_schema()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"Experience store {path} cannot be opened: {error}. Check that EDGE_DATA_DIR is "
                "writable and has space."
            ) from error
        self._expect_keys()

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    @property
    def key(self) -> str | None:
        """Id of the key that seals; None: nothing is sealed."""
        return self._sealing.current

    def cursor(self) -> int:
        """Number of the newest feedback; 0 when there is none."""
        return self._count("SELECT COALESCE(MAX(number), 0) FROM feedback")

    def _create_schema(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # without the write lock: a process that hangs may hold it
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != 0 and not OLDEST <= version <= SCHEMA_VERSION:
                raise StorageError(
                    f"Experience store {self._path} has schema {version}; this software reads "
                    f"schemas {OLDEST} to {SCHEMA_VERSION}. Use the software that wrote it, or "
                    "move the file away to start afresh."
                )
            upgrade(db, version)

    def _expect_keys(self) -> None:
        """Raises StorageError, before anything is changed, unless all keys that sealed are here."""
        used = {str(row["id"]) for row in self._query("SELECT id FROM keys")}
        if missing := sorted(used - self._sealing.known):
            self.close()
            held = ", ".join(sorted(self._sealing.known))
            has = f"holds {held}" if held else "is not set"
            raise StorageError(
                f"Experience store {self._path} is sealed with key {', '.join(missing)}; "
                f"EDGE_EXPERIENCE__KEY_FILE {has}. Name the file that holds that key, or add the "
                "key to it as a further line. Nothing was changed."
            )
        self._has_keys = True

    def _unseal(self, value: str | bytes | None) -> str | bytes | None:
        try:
            return self._sealing.unseal(value)
        except StorageError as error:
            self._unsealable = error
            raise

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                # Takes the write lock at once: a read that becomes a write cannot wait for another.
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    if self._has_keys and self._sealing.current is not None:
                        self._db.execute(
                            "INSERT OR IGNORE INTO keys VALUES (?)", (self._sealing.current,)
                        )
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

    def _vacuum(self, statement: str) -> None:
        """Runs a statement that frees pages to its end: `execute` frees one and stops."""
        with self._lock:
            try:
                self._db.executescript(statement)
            except sqlite3.Error as error:
                raise self._storage_error(error) from error

    def _count(self, statement: str, values: Any = ()) -> int:
        return int(self._query(statement, values)[0][0])

    def _storage_error(self, error: sqlite3.Error) -> StorageError:
        unsealable, self._unsealable = self._unsealable, None
        if unsealable is not None:
            return unsealable
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
