"""The durable store of interactions and feedback.

In: finished answers with their token ids, and feedback. Out: examples for training, a cursor,
counts. Guarantees: every write is one durable SQLite transaction, safe with several processes on
the same file; repeats change nothing; only what can be learnt is an example.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edge_node.errors import StorageError, UnknownInteraction
from edge_node.experience.usable import NO_VERDICT, why_unusable

SCHEMA_VERSION = 2
BUSY_TIMEOUT_S = 30
SCHEMA = """
CREATE TABLE interactions (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    finish_reason TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_ids BLOB NOT NULL, answer_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL,
    interaction_id TEXT NOT NULL REFERENCES interactions (id), score REAL, correction TEXT, comment TEXT,
    correction_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE INDEX feedback_of_interaction ON feedback (interaction_id, number);
"""
# What was said to be learnt, usable or not. A comment alone is no verdict: it must not hide an earlier correction.
OFFERED = """
FROM feedback f JOIN interactions i ON i.id = f.interaction_id
WHERE f.number = (
    SELECT MAX(newest.number) FROM feedback newest
    WHERE newest.interaction_id = f.interaction_id AND newest.number <= :up_to
      AND (newest.correction IS NOT NULL OR newest.score IS NOT NULL)
) AND (f.correction IS NOT NULL OR f.score >= 1)
"""
EXAMPLES = f"""
SELECT f.id AS feedback_id, i.id AS interaction_id, i.model, i.prompt_ids,
       CASE WHEN f.correction IS NULL THEN i.answer_ids ELSE f.correction_ids END AS target_ids,
       CASE WHEN f.correction IS NULL THEN 'verified' ELSE 'correction' END AS source
{OFFERED} AND f.unusable = '' ORDER BY f.number DESC LIMIT :limit
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
    """What the client read: empty for an answer of tool calls alone."""
    finish_reason: str
    endpoint: str
    prompt_ids: tuple[int, ...]
    """Token ids of the prompt as the engine had it."""
    answer_ids: tuple[int, ...]
    """Token ids of the answer as the engine made it, with reasoning, tool calls and the token that
    ended it.
    """
    unusable: str = ""
    """Why nothing can be learnt from it, whatever is said of it; empty when something can."""


@dataclass(frozen=True)
class Feedback:
    """What was said of an interaction: score from 0 to 1, the answer that would have been right, a remark."""

    interaction_id: str
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    correction_ids: tuple[int, ...] | None = ()
    """Token ids of the correction to the end of its turn; None when it is too long to be counted.
    """


@dataclass(frozen=True)
class Receipt:
    """Durable feedback. unusable: why nothing can be learnt from it; empty when something can."""

    id: str
    unusable: str


@dataclass(frozen=True)
class Example:
    """One thing to learn: `target_ids` is what should have been, or was rightly, answered to
    `prompt_ids`.
    """

    feedback_id: str
    interaction_id: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    source: Literal["correction", "verified"]
    model: str


@dataclass(frozen=True)
class Counts:
    """examples: usable ones; unusable: reason -> number of corrected and verified answers that
    cannot be learnt.
    """

    interactions: int
    feedback: int
    examples: int
    unusable: Mapping[str, int]


class ExperienceStore:
    """One open handle on the file; usable from several threads, and from several processes with a handle each."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._counted: tuple[int, Counter[str]] = 0, Counter()
        """Cursor, and the number of examples then by why they cannot be used (empty: they can)."""
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
            (
                row.id, row.created_at, row.model, row.endpoint, row.finish_reason, json.dumps(row.messages),
                row.answer, _pack(row.prompt_ids), _pack(row.answer_ids), row.unusable,
            )
            for row in rows
        ]  # fmt: skip
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO interactions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def add_feedback(self, feedback: Feedback, *, max_tokens: int) -> Receipt:
        """Makes `feedback` durable; the same again right after gives the same receipt. Raises
        UnknownInteraction.

        max_tokens: most tokens of prompt and answer together that can be learnt.
        """
        content = (feedback.score, feedback.correction, feedback.comment)
        with self._transaction() as db:
            found = db.execute(
                "SELECT unusable, LENGTH(prompt_ids), LENGTH(answer_ids) FROM interactions WHERE id = ?",
                (feedback.interaction_id,),
            ).fetchone()
            if found is None:
                raise UnknownInteraction(feedback.interaction_id)
            target_tokens: int | None = found[2] // TOKEN_BYTES
            if feedback.correction is not None:
                target_tokens = None if feedback.correction_ids is None else len(feedback.correction_ids)
            unusable = why_unusable(found[0], found[1] // TOKEN_BYTES, target_tokens, max_tokens)
            newest = db.execute(
                "SELECT id, score, correction, comment, unusable FROM feedback WHERE interaction_id = ? "
                "ORDER BY number DESC LIMIT 1",
                (feedback.interaction_id,),
            ).fetchone()
            if newest is not None and tuple(newest)[1:] == (*content, unusable):
                return _receipt(newest["id"], unusable, feedback)
            feedback_id = f"fb-{uuid.uuid4().hex}"
            db.execute(
                "INSERT INTO feedback (id, created_at, interaction_id, score, correction, comment, correction_ids, unusable)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    feedback_id, datetime.now(UTC).isoformat(), feedback.interaction_id, *content,
                    _pack(feedback.correction_ids or ()), unusable,
                ),
            )  # fmt: skip
            return _receipt(feedback_id, unusable, feedback)

    def interaction(self, interaction_id: str) -> Interaction | None:
        rows = self._query("SELECT * FROM interactions WHERE id = ?", (interaction_id,))
        if not rows:
            return None
        fields = dict(rows[0])
        ids = {name: _unpack(fields[name]) for name in ("prompt_ids", "answer_ids")}
        return Interaction(**{**fields, **ids, "messages": json.loads(fields["messages"])})

    def examples(self, *, up_to: int, limit: int) -> list[Example]:
        """Usable examples known at cursor `up_to`, newest feedback first, one per interaction."""
        rows = self._query(EXAMPLES, {"up_to": up_to, "limit": limit})
        return [
            Example(**{**row, "prompt_ids": _unpack(row["prompt_ids"]), "target_ids": _unpack(row["target_ids"])})
            for row in map(dict, rows)
        ]

    def cursor(self) -> int:
        """Number of the newest feedback; 0 when there is none."""
        return self._count("SELECT COALESCE(MAX(number), 0) FROM feedback")

    def failures(self, *, after: int, model: str | None = None) -> int:
        """Feedbacks after the cursor `after` with a usable correction, or a score below 1 and no
        correction.

        `model`: answers of that version only.
        """
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id "
            "WHERE f.number > :after AND CASE WHEN f.correction IS NULL THEN f.score < 1 ELSE f.unusable = '' END "
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
        offered = self._count_offered()
        return Counts(
            interactions=self._count("SELECT COUNT(*) FROM interactions"),
            feedback=self._count("SELECT COUNT(*) FROM feedback"),
            examples=offered[""],
            unusable={reason: offered[reason] for reason in sorted(offered) if reason and offered[reason]},
        )

    def _count_offered(self) -> Counter[str]:
        """Looks only at what is new since the last call: a whole count takes a second for 100,000 feedbacks."""
        with self._counting:
            before, known = self._counted
            cursor = self.cursor()
            if cursor > before:
                now = Counter(known)
                now.update(self._offered_since(before, cursor, up_to=cursor))
                if before:
                    now.subtract(self._offered_since(before, cursor, up_to=before))
                self._counted = cursor, now
            return self._counted[1]

    def _offered_since(self, after: int, cursor: int, *, up_to: int) -> Counter[str]:
        """Of the interactions spoken of after `after`: what was known of them at `up_to`."""
        count = f"SELECT f.unusable, COUNT(*) {OFFERED + SPOKEN_OF_SINCE} GROUP BY f.unusable"
        return Counter(dict(map(tuple, self._query(count, {"after": after, "cursor": cursor, "up_to": up_to}))))

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


TOKEN_BYTES = array("I").itemsize


def _pack(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


def _unpack(packed: bytes) -> tuple[int, ...]:
    return tuple(array("I", packed))


def _receipt(feedback_id: str, unusable: str, feedback: Feedback) -> Receipt:
    """Feedback without a verdict to learn is stored and counted, and nothing can be learnt from it
    either.
    """
    offers = feedback.correction is not None or (feedback.score or 0) >= 1
    return Receipt(feedback_id, unusable if offers else NO_VERDICT)
