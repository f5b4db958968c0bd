"""The durable store of interactions and feedback.

In: finished answers and feedback. Out: examples for training, a cursor, counts. Guarantees: every write is one
durable SQLite transaction, safe with several processes on the same file; repeats change nothing.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edge_node.errors import StorageError, UnknownInteraction

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30
SCHEMA = """
CREATE TABLE interactions (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    finish_reason TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL
);
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL,
    interaction_id TEXT NOT NULL REFERENCES interactions (id), score REAL, correction TEXT, comment TEXT
);
CREATE INDEX feedback_of_interaction ON feedback (interaction_id, number);
"""
# A comment alone is no verdict: it must not hide an earlier correction.
EXAMPLES = """
SELECT f.id AS feedback_id, i.id AS interaction_id, i.messages, i.answer, i.model, f.correction
FROM feedback f JOIN interactions i ON i.id = f.interaction_id
WHERE f.number = (
    SELECT MAX(newest.number) FROM feedback newest
    WHERE newest.interaction_id = f.interaction_id AND newest.number <= :up_to
      AND (newest.correction IS NOT NULL OR newest.score IS NOT NULL)
) AND (f.correction IS NOT NULL OR (f.score >= 1 AND i.answer <> ''))
"""
SPOKEN_OF_SINCE = """
AND f.interaction_id IN (SELECT interaction_id FROM feedback WHERE number > :after AND number <= :cursor)
"""


@dataclass(frozen=True)
class Interaction:
    """One finished request with its answer. model: the exact version that answered; created_at: ISO 8601, UTC."""

    id: str
    created_at: str
    model: str
    messages: list[dict[str, Any]]
    answer: str
    finish_reason: str
    endpoint: str


@dataclass(frozen=True)
class Feedback:
    """What was said of an interaction: score from 0 to 1, the answer that would have been right, a remark."""

    interaction_id: str
    score: float | None = None
    correction: str | None = None
    comment: str | None = None


@dataclass(frozen=True)
class Example:
    """One thing to learn: `target` is what should have been, or was rightly, answered to `messages`."""

    feedback_id: str
    interaction_id: str
    messages: list[dict[str, Any]]
    target: str
    source: Literal["correction", "verified"]
    model: str


@dataclass(frozen=True)
class Counts:
    interactions: int
    feedback: int
    examples: int


class ExperienceStore:
    """One open handle on the file; usable from several threads, and from several processes with a handle each."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._counted = 0, 0
        """Cursor, and the number of examples then."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            self._create_schema()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"Experience store {path} cannot be opened: {error}. Check that EDGE_DATA_DIR is writable and has space."
            ) from error

    def close(self) -> None:
        """Idempotent."""
        self._db.close()

    def add_interactions(self, rows: Sequence[Interaction]) -> None:
        """Stores `rows` in one durable transaction; an id that is already there is left as it is."""
        values = [
            (row.id, row.created_at, row.model, row.endpoint, row.finish_reason, json.dumps(row.messages), row.answer)
            for row in rows
        ]
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO interactions VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def add_feedback(self, feedback: Feedback) -> str:
        """Durable id of `feedback`; the same again right after gives the same id. Raises UnknownInteraction."""
        content = (feedback.score, feedback.correction, feedback.comment)
        with self._transaction() as db:
            if not db.execute("SELECT 1 FROM interactions WHERE id = ?", (feedback.interaction_id,)).fetchone():
                raise UnknownInteraction(feedback.interaction_id)
            newest = db.execute(
                "SELECT id, score, correction, comment FROM feedback WHERE interaction_id = ? ORDER BY number DESC LIMIT 1",
                (feedback.interaction_id,),
            ).fetchone()
            if newest is not None and tuple(newest)[1:] == content:
                return str(newest["id"])
            feedback_id = f"fb-{uuid.uuid4().hex}"
            db.execute(
                "INSERT INTO feedback (id, created_at, interaction_id, score, correction, comment) VALUES (?, ?, ?, ?, ?, ?)",
                (feedback_id, datetime.now(UTC).isoformat(), feedback.interaction_id, *content),
            )
            return feedback_id

    def interaction(self, interaction_id: str) -> Interaction | None:
        rows = self._query("SELECT * FROM interactions WHERE id = ?", (interaction_id,))
        if not rows:
            return None
        fields = dict(rows[0])
        return Interaction(**{**fields, "messages": json.loads(fields["messages"])})

    def examples(self, *, up_to: int, limit: int) -> list[Example]:
        """Examples known at cursor `up_to`, newest feedback first, one per interaction."""
        rows = self._query(EXAMPLES + "ORDER BY f.number DESC LIMIT :limit", {"up_to": up_to, "limit": limit})
        return [
            Example(
                feedback_id=row["feedback_id"],
                interaction_id=row["interaction_id"],
                messages=json.loads(row["messages"]),
                target=row["answer"] if row["correction"] is None else row["correction"],
                source="verified" if row["correction"] is None else "correction",
                model=row["model"],
            )
            for row in rows
        ]

    def cursor(self) -> int:
        """Number of the newest feedback; 0 when there is none."""
        return self._count("SELECT COALESCE(MAX(number), 0) FROM feedback")

    def failures(self, *, after: int, model: str | None = None) -> int:
        """Feedbacks after the cursor `after` with a correction or a score below 1; `model`: answers of that version only."""
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id "
            "WHERE f.number > :after AND (f.correction IS NOT NULL OR f.score < 1) "
            "AND (:model IS NULL OR i.model = :model)",
            {"after": after, "model": model},
        )

    def judged(self, *, after: int, model: str) -> int:
        """Feedbacks after the cursor `after` with a score or a correction on answers of the exact version `model`."""
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id "
            "WHERE f.number > :after AND (f.correction IS NOT NULL OR f.score IS NOT NULL) AND i.model = :model",
            {"after": after, "model": model},
        )

    def counts(self) -> Counts:
        return Counts(
            interactions=self._count("SELECT COUNT(*) FROM interactions"),
            feedback=self._count("SELECT COUNT(*) FROM feedback"),
            examples=self._count_examples(),
        )

    def _count_examples(self) -> int:
        """Looks only at what is new since the last call: a whole count takes a second for 100,000 feedbacks."""
        with self._counting:
            before, known = self._counted
            cursor = self.cursor()
            if cursor > before:
                count = f"SELECT COUNT(*) FROM ({EXAMPLES + SPOKEN_OF_SINCE})"
                window = {"after": before, "cursor": cursor}
                gone = self._count(count, window | {"up_to": before}) if before else 0
                self._counted = cursor, known - gone + self._count(count, window | {"up_to": cursor})
            return self._counted[1]

    def _create_schema(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
            return  # without the write lock: a process that hangs may hold it
        with self._transaction() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise StorageError(
                    f"Experience store {self._path} has schema {version}; this software reads schema {SCHEMA_VERSION}. "
                    "Use the software that wrote it, or move the file away to start afresh."
                )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                # Takes the write lock at once: a read that turns into a write cannot wait for another writer.
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
            f"Experience store {self._path} failed: {error}. Check space and permissions of EDGE_DATA_DIR."
        )
