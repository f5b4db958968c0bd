"""What leaves the experience store for good.

In: ids of interactions, or a selection of them. Out: tombstones, freed disk. Guarantees: what was
removed leaves the file's free pages too (secure_delete) and never comes back; a removal is many
short transactions, so a node that serves goes on meanwhile; one that was killed goes on when it is
run again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from edge_node.errors import UnknownInteraction
from edge_node.experience.resealing import Resealed
from edge_node.experience.selection import Selection

BATCH = 200
"""Interactions that go in one transaction."""
PAGES = 2_000
"""Free pages that are given back in one transaction."""
INCREMENTAL = 2
"""What SQLite calls a file that can give back pages without a copy of itself."""


@dataclass(frozen=True)
class Purged:
    """interactions, feedback: how many went. freed_bytes: of disk."""

    interactions: int
    feedback: int
    freed_bytes: int


class Removal(Resealed):
    """The part of the experience store that deletes."""

    def delete(self, interaction_id: str) -> None:
        """Removes an interaction and all that was said of it, also from the file's free pages.

        Raises UnknownInteraction. It never comes back: the same id is not stored again.
        """
        with self._transaction() as db:
            if not remove(db, [interaction_id], DELETED):
                raise UnknownInteraction(interaction_id)
        self._truncate_log()

    def purge(
        self, selection: Selection, removed: Callable[[int], None] = lambda count: None
    ) -> Purged:
        """Removes every interaction that `selection` means now, with its feedback; frees the disk.

        A selection by user alone also takes what that user said of other answers. What waits for
        answers goes where everything goes, or by its age. `removed` hears of each batch.
        """
        before, said = self._size(), self._count("SELECT COUNT(*) FROM feedback")
        ids = [row["id"] for row in self._query(f"SELECT i.id {selection.sql}", selection.values)]
        count = 0
        for start in range(0, len(ids), BATCH):
            with self._transaction() as db:
                count += remove(db, ids[start : start + BATCH], DELETED)
            removed(count)
        with self._transaction() as db:
            _remove_said(db, selection)
        said -= self._count("SELECT COUNT(*) FROM feedback")
        self.free_disk()
        return Purged(count, max(said, 0), max(before - self._size(), 0))

    def free_disk(self) -> None:
        """Gives the free pages of the file back to the disk.

        A file of earlier software is copied once for that: it needs as much space again meanwhile,
        and other writers wait.
        """
        if self._count("PRAGMA auto_vacuum") != INCREMENTAL:
            self._query("PRAGMA auto_vacuum=INCREMENTAL")
            self._vacuum("VACUUM")
        while self._count("PRAGMA freelist_count"):
            left = self._count("PRAGMA freelist_count")
            self._vacuum(f"PRAGMA incremental_vacuum({PAGES})")
            if self._count("PRAGMA freelist_count") >= left:
                break
        self._truncate_log()

    def deleted(self, *, up_to: int | None = None) -> int:
        """How many interactions were deleted, and how much feedback that was known at `up_to`."""
        return self._count(
            "SELECT (SELECT COUNT(*) FROM deleted) + (SELECT COUNT(*) FROM withdrawn WHERE number "
            "<= COALESCE(?, number))",
            (up_to,),
        )

    def deleted_interactions(self) -> int:
        """How many tombstones there are."""
        return self._count("SELECT COUNT(*) FROM deleted")

    def _size(self) -> int:
        """Bytes on disk."""
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def _truncate_log(self) -> None:
        # The log still has the pages of before; what another process reads now stays until it ends.
        self._query("PRAGMA wal_checkpoint(TRUNCATE)")


DELETED = "INSERT OR IGNORE INTO deleted SELECT id, :at FROM interactions WHERE id IN"
"""How it is remembered that interactions were deleted: they never come back."""


def remove(
    db: sqlite3.Connection, ids: Sequence[str], tombstones: str, why: str | None = None
) -> int:
    """Removes these interactions and all that was said of them; returns how many there were.

    tombstones: a statement that remembers them, without the ids that end it.
    """
    of_them = {"ids": json.dumps(ids), "at": datetime.now(UTC).isoformat(), "why": why}
    among = "(SELECT value FROM json_each(:ids))"
    numbers = [
        (row["number"], row["id"])
        for row in db.execute(
            f"SELECT f.number, COALESCE(f.part_of, f.id) AS id FROM feedback f WHERE "
            f"f.interaction_id IN {among} UNION SELECT c.number, f.id FROM comparisons c JOIN "
            "feedback f ON f.number = c.number WHERE "
            f"json_extract(c.said, '$.rejected[0]') IN {among}",
            of_them,
        )
    ]
    _remove_feedback(db, numbers)
    for table in ("choices", "users", "labels"):
        db.execute(f"DELETE FROM {table} WHERE interaction_id IN {among}", of_them)
    remove_waiting(db, f"first IN {among} OR second IN {among}", of_them)
    db.execute(f"{tombstones} {among}", of_them)
    return db.execute(f"DELETE FROM interactions WHERE id IN {among}", of_them).rowcount


def _remove_said(db: sqlite3.Connection, selection: Selection) -> None:
    """What a selection takes beyond interactions."""
    if selection.is_everything:
        db.execute("DELETE FROM waiting")
        db.execute("DELETE FROM sent")
    elif selection.is_user:
        rows = db.execute(
            "SELECT number, COALESCE(part_of, id) AS id FROM feedback WHERE user = ?",
            (selection.user,),
        ).fetchall()
        now = datetime.now(UTC).isoformat()
        db.executemany(
            "INSERT OR IGNORE INTO withdrawn VALUES (?, ?, ?, ?)",
            [(row["id"], row["number"], selection.user, now) for row in rows],
        )
        _remove_feedback(db, [(row["number"], row["id"]) for row in rows])
        remove_waiting(db, "user = :user", selection.values)
    elif selection.is_age:
        remove_waiting(db, "created_at < :before", selection.values)


def remove_waiting(db: sqlite3.Connection, which: str, values: Mapping[str, str | None]) -> None:
    """What waits for answers, and what idempotency keys know of it. `which`: a condition."""
    ids = f"SELECT id FROM waiting WHERE {which}"
    db.execute(f"DELETE FROM sent WHERE feedback_id IN ({ids})", values)
    db.execute(f"DELETE FROM waiting WHERE {which}", values)


def _remove_feedback(db: sqlite3.Connection, rows: Sequence[tuple[int, str]]) -> None:
    """Rows of feedback by number, and what idempotency keys know of them by id."""
    db.executemany("DELETE FROM comparisons WHERE number = ?", [row[:1] for row in rows])
    db.executemany("DELETE FROM feedback WHERE number = ?", [row[:1] for row in rows])
    db.executemany("DELETE FROM sent WHERE feedback_id = ?", [row[1:] for row in rows])
