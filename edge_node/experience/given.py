"""Feedback as somebody gave it: by whom, once, read back, taken back.

In: who gives it, and an idempotency key. Out: receipts, what was said, tombstones. Guarantees: what
comes with the same key again is answered with the same receipt and writes nothing, in the same
transaction as the feedback itself; what was taken back is learnt by no later round.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from edge_node.errors import FeedbackWithdrawn, KeyReused, UnknownFeedback, UnknownInteraction
from edge_node.experience.records import Receipt, Teller, Told
from edge_node.experience.retention import Retained

WAITING = """
SELECT id, created_at, user, unseal(said) AS said, first, second, max_tokens, refused FROM waiting
"""
KEYS_KEPT = timedelta(days=7)
"""How long an idempotency key is remembered."""
ROWS = """
SELECT f.id, f.created_at, f.kind, f.interaction_id, f.user, f.part_of, f.score, f.unusable,
       unseal(f.correction) AS correction, unseal(f.comment) AS comment, c.said, l.episode
FROM feedback f
LEFT JOIN comparisons c ON c.number = f.number
LEFT JOIN labels l ON l.interaction_id = f.interaction_id
WHERE f.id = :id OR f.part_of = :id ORDER BY f.number
"""


class Given(Retained):
    """The part of the experience store that knows feedback by its id."""

    def feedback(self, feedback_id: str, user: str | None = None) -> Told:
        """What was said; `user`: only if that user's key said it.

        Raises UnknownFeedback, and FeedbackWithdrawn for what was taken back.
        """
        rows = self._query(ROWS, {"id": feedback_id})
        waiting = self._query(f"{WAITING} WHERE id = ?", (feedback_id,))
        owner = rows[0]["user"] if rows else waiting[0]["user"] if waiting else None
        if not (rows or waiting) or user not in (None, owner):
            raise self._not_there(feedback_id, user)
        if waiting:
            return _waiting(waiting[0])
        row, is_part = rows[0], rows[0]["part_of"] == feedback_id
        return Told(
            feedback_id, row["created_at"], row["kind"],
            tuple(part["interaction_id"] for part in rows), row["user"],
            row["episode"] if is_part else None, row["score"], row["correction"], row["comment"],
            json.loads(row["said"]) if row["said"] else {},
            "" if any(not part["unusable"] for part in rows) else row["unusable"],
        )  # fmt: skip

    def withdraw(self, feedback_id: str, user: str | None = None) -> str:
        """Takes feedback back and returns when it was; again: when it first was.

        A round under way that may hold it is given up. Raises UnknownFeedback.
        """
        now = datetime.now(UTC).isoformat()
        try:
            self.feedback(feedback_id, user)
        except FeedbackWithdrawn as error:
            return error.at
        with self._transaction() as db:
            of_it = {"id": feedback_id}
            rows = db.execute(
                "SELECT number, user FROM feedback WHERE id = :id OR part_of = :id UNION ALL "
                "SELECT NULL, user FROM waiting WHERE id = :id ORDER BY number",
                of_it,
            ).fetchall()
            if not rows:  # another process was faster
                raise UnknownFeedback(feedback_id)
            numbers = [(row["number"],) for row in rows]
            db.executemany("DELETE FROM comparisons WHERE number = ?", numbers)
            db.execute("DELETE FROM feedback WHERE id = :id OR part_of = :id", of_it)
            db.execute("DELETE FROM waiting WHERE id = :id", of_it)
            db.execute(
                "INSERT INTO withdrawn VALUES (?, ?, ?, ?)",
                (feedback_id, rows[0]["number"], rows[0]["user"], now),
            )
        self._truncate_log()
        return now

    def _not_there(self, feedback_id: str, user: str | None) -> UnknownFeedback:
        rows = self._query("SELECT user, at FROM withdrawn WHERE id = ?", (feedback_id,))
        if rows and user in (None, rows[0]["user"]):
            return FeedbackWithdrawn(feedback_id, rows[0]["at"])
        return UnknownFeedback(feedback_id)

    def _give(self, teller: Teller, write: Callable[[sqlite3.Connection], Receipt]) -> Receipt:
        """What `write` does in one transaction, or the receipt of what came with this key before.

        Raises KeyReused when something else came with it, and as `write`.
        """
        with self._transaction() as db:
            if teller.once is None:
                return write(db)
            sent = db.execute(
                "SELECT unseal(digest) AS digest, receipt FROM sent WHERE sender = ? AND key = ?",
                (teller.sender, teller.once),
            ).fetchone()
            if sent is not None and sent["digest"] != teller.digest:
                raise KeyReused(teller.once)
            if sent is not None:
                return Receipt(**json.loads(sent["receipt"]))
            receipt, now = write(db), datetime.now(UTC)
            db.execute("DELETE FROM sent WHERE at < ?", ((now - KEYS_KEPT).isoformat(),))
            said = json.dumps(asdict(receipt))
            db.execute(
                "INSERT INTO sent VALUES (?, ?, seal(?), ?, ?, ?)",
                (teller.sender, teller.once, teller.digest, receipt.id, said, now.isoformat()),
            )
            return receipt


Waited = tuple[str, str]
"""Id and time of feedback that was acknowledged before its answer was stored."""


def new_said() -> Waited:
    """Id and time of feedback that comes now."""
    return f"fb-{uuid.uuid4().hex}", datetime.now(UTC).isoformat()


def expect_interaction(db: sqlite3.Connection, interaction_id: str, user: str | None) -> None:
    """Raises UnknownInteraction unless it is there, and asked by `user`, where there is one.

    Whose it is stays unsaid.
    """
    if not db.execute(
        "SELECT 1 FROM interactions i LEFT JOIN users u ON u.interaction_id = i.id WHERE i.id = ?1 "
        "AND (?2 IS NULL OR u.user = ?2)",
        (interaction_id, user),
    ).fetchone():
        raise UnknownInteraction(interaction_id)


def _waiting(row: sqlite3.Row) -> Told:
    fields = json.loads(row["said"])
    said = {name: fields[name] for name in ("chosen", "rejected", "scores") if name in fields}
    return Told(
        row["id"], row["created_at"], fields["kind"],
        tuple(one for one in (row["first"], row["second"]) if one), row["user"],
        score=fields.get("score"), correction=fields.get("correction"),
        comment=fields.get("comment"), said=said, waits=True, refused=row["refused"],
    )  # fmt: skip
