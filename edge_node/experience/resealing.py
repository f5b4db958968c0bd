"""Encrypts what is in the store already, with the key that seals now.

In: an open store with a key. Out: the same rows, sealed with that key. Guarantees: each step is one
durable transaction, so what was killed goes on when it is run again, and a node may serve
meanwhile; what was in clear leaves the file's free pages and its log too.
"""

from __future__ import annotations

from collections.abc import Callable

from edge_node.errors import SettingsError
from edge_node.experience.database import Database
from edge_node.experience.sealing import MAKE_ONE

STEP = 200
"""Most rows of one transaction."""
SEALED = {
    "interactions": (("rowid",), ("messages", "answer", "prompt_ids", "answer_ids")),
    "choices": (("interaction_id", "position"), ("answer_ids", "logprobs")),
    "feedback": (("number",), ("correction", "comment", "correction_ids")),
    "waiting": (("id",), ("said",)),
    "sent": (("sender", "key"), ("digest",)),
}
"""Table -> its key, and its columns that are sealed; all others are in clear."""


class Resealed(Database):
    """The part of the experience store that changes keys."""

    def reseal(self, heard: Callable[[int], None] = lambda rows: None) -> int:
        """Seals every value that the current key has not sealed; returns how many rows changed.

        Then older keys are needed no more. `heard` is told the number of rows after each step.
        Raises SettingsError without a key.
        """
        if self._sealing.current is None:
            raise SettingsError(
                f"EDGE_EXPERIENCE__KEY_FILE is not set, so there is no key to seal with. {MAKE_ONE}"
            )
        total = 0
        while changed := sum(self._reseal_table(table, heard) for table in SEALED):
            total += changed  # and once more: a process may have written meanwhile
        with self._transaction() as db:
            db.execute("DELETE FROM keys WHERE id <> ?", (self._sealing.current,))
        self._query("PRAGMA wal_checkpoint(TRUNCATE)")
        return total

    def _reseal_table(self, table: str, heard: Callable[[int], None]) -> int:
        key, columns = SEALED[table]
        names, all_changed = ", ".join(key), 0
        after: tuple[object, ...] = ()
        while True:
            with self._transaction() as db:
                where = f"WHERE ({names}) > ({', '.join('?' * len(key))})" if after else ""
                rows = db.execute(
                    f"SELECT {names}, {', '.join(columns)} FROM {table} {where} ORDER BY {names} "
                    f"LIMIT {STEP}",
                    after,
                ).fetchall()
                changed = [
                    row
                    for row in map(tuple, rows)
                    if any(map(self._sealing.needs_sealing, row[len(key) :]))
                ]
                db.executemany(
                    f"UPDATE {table} SET "
                    f"{', '.join(f'{column} = seal(unseal(?))' for column in columns)} WHERE "
                    f"({names}) = ({', '.join('?' * len(key))})",
                    [(*row[len(key) :], *row[: len(key)]) for row in changed],
                )
            all_changed += len(changed)
            heard(all_changed)
            if len(rows) < STEP:
                return all_changed
            after = tuple(rows[-1])[: len(key)]
