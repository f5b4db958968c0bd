"""Retention: what is too old, or more than the disk should hold, is removed for good.

In: an age, a size, and how far an unfinished round reads. Out: a smaller file, and a tombstone for
each interaction, which says why feedback on it cannot be used. Guarantees: each step is one durable
transaction, so a kill leaves no half of one; what an unfinished round refers to stays until it has
ended; freed pages go back to the disk, overwritten. Writers wait for a step only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from edge_node.experience.removal import INCREMENTAL, Removal, remove, remove_waiting
from edge_node.experience.usable import TOO_MUCH, TOO_OLD

STEP = 500
"""Most interactions that one transaction removes."""
TOMBSTONES = 100_000
"""Newest removed interactions whose ids are remembered: about 20 MiB."""
ROOM_LEFT = 0.95
"""A file that was too large shrinks to this part of its bound, not to the last byte of it."""

REMOVED = (
    "INSERT OR IGNORE INTO removed (id, at, why) SELECT id, :at, :why FROM interactions WHERE id IN"
)
"""How it is remembered that interactions were removed."""
REFERRED = """
WITH referred AS (
    SELECT interaction_id AS id FROM feedback WHERE number <= :reads
    UNION SELECT json_extract(said, '$.rejected[0]') FROM comparisons
    WHERE number <= :reads AND kind = 'preference'
)
"""
OLD = f"""
{REFERRED} SELECT id FROM interactions WHERE created_at < :before
AND id NOT IN (SELECT id FROM referred WHERE id IS NOT NULL) ORDER BY created_at LIMIT :step
"""
OLDEST = f"""
{REFERRED}, judged AS (
    SELECT interaction_id AS id FROM feedback
    UNION SELECT json_extract(said, '$.rejected[0]') FROM comparisons WHERE kind = 'preference'
)
SELECT id FROM interactions WHERE id NOT IN (SELECT id FROM referred WHERE id IS NOT NULL)
ORDER BY id IN (SELECT id FROM judged WHERE id IS NOT NULL), created_at LIMIT :step
"""


class Retained(Removal):
    """The part of the experience store that forgets."""

    def remove_older(self, days: float, reads: Callable[[], int]) -> int:
        """Removes interactions older than `days`, with what was said of them; how many.

        reads: number of the newest feedback that an unfinished round reads; 0 without one.
        """
        before = (datetime.now(UTC) - timedelta(days=days)).isoformat()
        with self._transaction() as db:
            remove_waiting(db, "created_at < :before", {"before": before})
        removed = 0
        while count := self._remove_step(OLD, {"before": before, "step": STEP}, TOO_OLD, reads):
            removed += count
        return self._freed(removed)

    def remove_beyond(self, most_bytes: int, reads: Callable[[], int]) -> int:
        """Removes the oldest interactions until the file holds at most `most_bytes`; how many.

        Those that nobody judged go first. reads: as in remove_older.
        """
        removed = 0
        if self.held_bytes() <= most_bytes:
            return 0
        while (held := self.held_bytes()) > most_bytes * ROOM_LEFT:
            kept = max(1, self._count("SELECT COUNT(*) FROM interactions"))
            step = round(kept * (1 - most_bytes * ROOM_LEFT / held)) + 1
            count = self._remove_step(OLDEST, {"step": min(step, STEP)}, TOO_MUCH, reads)
            if not count:
                break
            removed += count
        return self._freed(removed)

    def removed(self) -> int:
        """How many interactions were removed so far."""
        return self._count(
            "SELECT COALESCE((SELECT seq FROM sqlite_sequence WHERE name = 'removed'), 0)"
        )

    def why_removed(self, interaction_id: str) -> str:
        """Why the interaction was removed; empty for one that was not."""
        rows = self._query("SELECT why FROM removed WHERE id = ?", (interaction_id,))
        return str(rows[0]["why"]) if rows else ""

    def held_bytes(self) -> int:
        """What the file holds, without pages that are free."""
        page, pages, free = (
            self._count(f"PRAGMA {name}") for name in ("page_size", "page_count", "freelist_count")
        )
        return page * (pages - free)

    def make_shrinkable(self) -> None:
        """Rewrites a file of earlier software, so that it can shrink. Nobody else may use it."""
        if self._count("PRAGMA auto_vacuum") != INCREMENTAL:
            self.free_disk()

    def _remove_step(
        self, which: str, values: dict[str, object], why: str, reads: Callable[[], int]
    ) -> int:
        with self._transaction() as db:
            # Asked inside: a round that begins later finds what is left.
            known = reads()
            ids = [row["id"] for row in db.execute(which, values | {"reads": known})]
            if not ids or reads() != known:
                return 0
            remove(db, ids, REMOVED, why)
            db.execute(
                "DELETE FROM removed WHERE number <= (SELECT MAX(number) FROM removed) - ?",
                (TOMBSTONES,),
            )
            return len(ids)

    def _freed(self, removed: int) -> int:
        """Gives free pages back to the disk; `removed`. A file that cannot shrink keeps them."""
        free = self._count("PRAGMA freelist_count")
        if (removed or free) and self._count("PRAGMA auto_vacuum") == INCREMENTAL:
            self.free_disk()
        return removed
