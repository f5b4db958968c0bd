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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from edge_node.errors import UnknownInteraction
from edge_node.experience.comparisons import Comparisons, Receipt
from edge_node.experience.database import (
    BUSY_TIMEOUT_S,
    TOKEN_BYTES,
    pack,
    pack_logprobs,
    unpack,
    unpack_logprobs,
)
from edge_node.experience.replay import draw
from edge_node.experience.usable import DISLIKED, LIKED, NO_VERDICT, why_unusable

# The verdict on each answer, usable or not. A comment alone must not hide an earlier correction.
VERDICTS = """
FROM feedback f JOIN interactions i ON i.id = f.interaction_id
WHERE f.number = (
    SELECT MAX(newest.number) FROM feedback newest
    WHERE newest.interaction_id = f.interaction_id AND newest.number <= :up_to
      AND (newest.correction IS NOT NULL OR newest.score IS NOT NULL)
)
"""
VERDICT = f"""
CASE WHEN f.correction IS NOT NULL THEN 'correction' WHEN f.score >= {LIKED} THEN 'liked'
     WHEN f.score < {DISLIKED} THEN 'disliked' ELSE 'undecided' END
"""
_EXAMPLE = """
SELECT f.id AS feedback_id, i.id AS interaction_id, i.model, i.prompt_ids,
       CASE WHEN f.correction IS NULL THEN i.answer_ids ELSE f.correction_ids END AS target_ids,
       CASE WHEN f.correction IS NULL THEN 'verified' ELSE 'correction' END AS source
"""
TEACHES = f"f.unusable = '' AND (f.correction IS NOT NULL OR f.score >= {LIKED})"
EXAMPLES = f"{_EXAMPLE} {VERDICTS} AND {TEACHES} ORDER BY f.number DESC LIMIT :limit"
EARLIER = f"""
SELECT f.number, i.model {VERDICTS} AND {TEACHES} AND substr(i.model, -length(:but)) <> :but
"""
NUMBERED = f"""
{_EXAMPLE} FROM feedback f JOIN interactions i ON i.id = f.interaction_id
WHERE f.number IN (SELECT value FROM json_each(:numbers)) ORDER BY f.number DESC
"""
THUMBS = f"""
SELECT i.prompt_ids, i.answer_ids {VERDICTS} AND f.unusable = '' AND {VERDICT} = :verdict
ORDER BY f.number DESC LIMIT :limit
"""
TAUGHT = ("correction", "liked")
"""Verdicts that make an example of an answer."""
SPOKEN_OF_SINCE = """
AND f.interaction_id IN (
    SELECT interaction_id FROM feedback WHERE number > :after AND number <= :cursor
)
"""


@dataclass(frozen=True)
class Choice:
    """One of several answers of a request. logprobs: of each token, natural; empty: not known."""

    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Interaction:
    """One finished request. model: the exact version that answered. created_at: ISO 8601, UTC."""

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
    """Token ids of the answer as made, with reasoning, tool calls and the token that ended it."""
    unusable: str = ""
    """Why nothing can be learnt from it, whatever is said of it; empty when something can."""
    choices: tuple[Choice, ...] = ()
    """All answers of a request with several, in order; `answer_ids` are those of the first."""
    user: str | None = None
    """Of the access key that it was asked with; never leaves the node."""


@dataclass(frozen=True)
class Feedback:
    """What was said of an interaction. score: 0..1. correction: the right answer."""

    interaction_id: str
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    correction_ids: tuple[int, ...] | None = ()
    """Token ids of the correction to the end of its turn; None when it is too long to be counted.
    """


@dataclass(frozen=True)
class Example:
    """One thing to learn: `target_ids` is the right answer to `prompt_ids`."""

    feedback_id: str
    interaction_id: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    source: Literal["correction", "verified"]
    model: str


@dataclass(frozen=True)
class Thumb:
    """An answer that was only liked or disliked, in token ids."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    liked: bool


@dataclass(frozen=True)
class Counts:
    """examples: usable ones; of them `liked` were not corrected. disliked: usable, not corrected.

    unusable: reason -> number of answers that cannot be learnt; unusable_comparisons: the same of
    preferences and scored groups.
    """

    interactions: int
    feedback: int
    examples: int
    unusable: Mapping[str, int]
    liked: int = 0
    disliked: int = 0
    preferences: int = 0
    scored_groups: int = 0
    unusable_comparisons: Mapping[str, int] = field(default_factory=dict)


class ExperienceStore(Comparisons):
    """All of the experience."""

    def __init__(self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        super().__init__(path, busy_timeout_s=busy_timeout_s)
        self._counting = threading.Lock()
        self._counted: tuple[int, Counter[tuple[str, str]]] = 0, Counter()
        """Cursor, and how much had been said then: by verdict or kind of comparison, and by why it
        cannot be used (empty: it can).
        """
        self._deleted = 0
        """How many deletions `_counted` knows."""

    def add_interactions(self, rows: Sequence[Interaction]) -> None:
        """Stores `rows` in one durable transaction, but for ids that are there or were deleted."""
        values = [
            (
                row.id, row.created_at, row.model, row.endpoint, row.finish_reason,
                json.dumps(row.messages), row.answer, pack(row.prompt_ids),
                pack(row.answer_ids), row.unusable,
            )
            for row in rows
        ]  # fmt: skip
        choices = [
            (row.id, position, pack(choice.answer_ids), pack_logprobs(choice.logprobs))
            for row in rows
            for position, choice in enumerate(row.choices)
        ]
        users = [(row.id, row.user) for row in rows if row.user is not None]
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO interactions SELECT ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10 "
                "WHERE NOT EXISTS (SELECT 1 FROM deleted WHERE id = ?1)",
                values,
            )
            db.executemany(
                "INSERT OR IGNORE INTO choices SELECT ?1, ?2, ?3, ?4 WHERE EXISTS (SELECT 1 FROM "
                "interactions WHERE id = ?1)",
                choices,
            )
            db.executemany(
                "INSERT OR IGNORE INTO users SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM "
                "interactions WHERE id = ?1)",
                users,
            )

    def expect_asked_by(self, user: str, interaction_id: str) -> None:
        """Raises UnknownInteraction unless `user`'s key asked for it: whose it is stays unsaid."""
        if self._user(interaction_id) != user:
            raise UnknownInteraction(interaction_id)

    def add_feedback(self, feedback: Feedback, *, max_tokens: int) -> Receipt:
        """Makes `feedback` durable; the same again right after gives the same receipt.

        Raises UnknownInteraction.

        max_tokens: most tokens of prompt and answer together that can be learnt.
        """
        content = (feedback.score, feedback.correction, feedback.comment)
        with self._transaction() as db:
            found = db.execute(
                "SELECT unusable, LENGTH(prompt_ids), LENGTH(answer_ids) FROM interactions WHERE "
                "id = ?",
                (feedback.interaction_id,),
            ).fetchone()
            if found is None:
                raise UnknownInteraction(feedback.interaction_id)
            target_tokens: int | None = found[2] // TOKEN_BYTES
            if feedback.correction is not None:
                target_tokens = (
                    None if feedback.correction_ids is None else len(feedback.correction_ids)
                )
            unusable = why_unusable(found[0], found[1] // TOKEN_BYTES, target_tokens, max_tokens)
            newest = db.execute(
                "SELECT id, score, correction, comment, unusable FROM feedback WHERE "
                "interaction_id = ? ORDER BY number DESC LIMIT 1",
                (feedback.interaction_id,),
            ).fetchone()
            if newest is not None and tuple(newest)[1:] == (*content, unusable):
                return _receipt(newest["id"], unusable, feedback)
            feedback_id = f"fb-{uuid.uuid4().hex}"
            db.execute(
                "INSERT INTO feedback (id, created_at, interaction_id, score, correction, "
                "comment, correction_ids, unusable) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    feedback_id, datetime.now(UTC).isoformat(), feedback.interaction_id, *content,
                    pack(feedback.correction_ids or ()), unusable,
                ),
            )  # fmt: skip
            return _receipt(feedback_id, unusable, feedback)

    def interaction(self, interaction_id: str) -> Interaction | None:
        rows = self._query("SELECT * FROM interactions WHERE id = ?", (interaction_id,))
        if not rows:
            return None
        fields = dict(rows[0])
        ids = {name: unpack(fields[name]) for name in ("prompt_ids", "answer_ids")}
        fields |= {"messages": json.loads(fields["messages"]), "user": self._user(interaction_id)}
        choices = self._query(
            "SELECT answer_ids, logprobs FROM choices WHERE interaction_id = ? ORDER BY position",
            (interaction_id,),
        )
        return Interaction(
            **{**fields, **ids},
            choices=tuple(
                Choice(unpack(row["answer_ids"]), unpack_logprobs(row["logprobs"]))
                for row in choices
            ),
        )

    def _user(self, interaction_id: str) -> str | None:
        rows = self._query("SELECT user FROM users WHERE interaction_id = ?", (interaction_id,))
        return str(rows[0]["user"]) if rows else None

    def examples(self, *, up_to: int, limit: int) -> list[Example]:
        """Usable examples known at cursor `up_to`, newest feedback first, one per interaction."""
        return list(map(_example, self._query(EXAMPLES, {"up_to": up_to, "limit": limit})))

    def replay(self, *, up_to: int, but: str, count: int, seed: int) -> list[Example]:
        """At most `count` usable examples known at cursor `up_to`, newest feedback first, in equal
        parts of all models whose name does not end with `but` (replay.py). It draws by the number
        of the feedback, since ids differ from run to run.
        """
        if not count:
            return []
        rows = self._query(EARLIER, {"up_to": up_to, "but": but})
        drawn = draw(((row["number"], row["model"]) for row in rows), count=count, seed=seed)
        return list(map(_example, self._query(NUMBERED, {"numbers": json.dumps(drawn)})))

    def thumbs(self, *, up_to: int, limit: int) -> list[Thumb]:
        """Usable answers that were liked or disliked and not corrected, as known at cursor `up_to`:
        the newest `limit` of each.
        """
        return [
            Thumb(unpack(row["prompt_ids"]), unpack(row["answer_ids"]), verdict == "liked")
            for verdict in ("liked", "disliked")
            for row in self._query(THUMBS, {"up_to": up_to, "limit": limit, "verdict": verdict})
        ]

    def failures(self, *, after: int, model: str | None = None) -> int:
        """Failures after cursor `after`: a usable correction, or a score below 1 without one.

        `model`: answers of that version only.
        """
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id WHERE "
            "f.number > :after AND CASE WHEN f.correction IS NULL THEN f.score < 1 ELSE "
            "f.unusable = '' END AND (:model IS NULL OR i.model = :model)",
            {"after": after, "model": model},
        )

    def judged(self, *, after: int, model: str) -> int:
        """Feedback after cursor `after`, with a score or correction, on answers of `model`."""
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id WHERE "
            "f.number > :after AND (f.correction IS NOT NULL OR f.score IS NOT NULL) AND i.model "
            "= :model",
            {"after": after, "model": model},
        )

    def corrections(self, *, after: int, model: str) -> int:
        """Usable corrections after cursor `after` of answers of `model`."""
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id WHERE "
            "f.number > :after AND f.correction IS NOT NULL AND f.unusable = '' AND i.model = "
            ":model",
            {"after": after, "model": model},
        )

    def dislikes(self, *, after: int, model: str) -> int:
        """Usable scores below DISLIKED after cursor `after`, of answers of `model`."""
        return self._count(
            "SELECT COUNT(*) FROM feedback f JOIN interactions i ON i.id = f.interaction_id WHERE "
            f"f.number > :after AND {VERDICT} = 'disliked' AND f.unusable = '' AND i.model = "
            ":model",
            {"after": after, "model": model},
        )

    def counts(self) -> Counts:
        said = self._count_said()
        return Counts(
            interactions=self._count("SELECT COUNT(*) FROM interactions"),
            feedback=self._count("SELECT COUNT(*) FROM feedback"),
            examples=sum(said[verdict, ""] for verdict in TAUGHT),
            unusable=_reasons(said, TAUGHT),
            liked=said["liked", ""],
            disliked=said["disliked", ""],
            preferences=said["preference", ""],
            scored_groups=said["group", ""],
            unusable_comparisons=_reasons(said, ("preference", "group")),
        )

    def _count_said(self) -> Counter[tuple[str, str]]:
        """Counts only what is new since the last call or deletion: 100,000 take a second."""
        with self._counting:
            deleted = self.deleted()
            if deleted != self._deleted:
                self._deleted, self._counted = deleted, (0, Counter())
            before, known = self._counted
            cursor = self.cursor()
            if cursor > before:
                now = Counter(known)
                for since in (self._verdicts_since, self.comparisons_since):
                    now.update(since(before, cursor, up_to=cursor))
                    if before:
                        now.subtract(since(before, cursor, up_to=before))
                self._counted = cursor, now
            return self._counted[1]

    def _verdicts_since(self, after: int, cursor: int, *, up_to: int) -> Counter[tuple[str, str]]:
        """Of the interactions spoken of after `after`: what was known of them at `up_to`."""
        count = (
            f"SELECT {VERDICT} AS verdict, f.unusable, COUNT(*) {VERDICTS + SPOKEN_OF_SINCE} GROUP "
            "BY verdict, f.unusable"
        )
        rows = self._query(count, {"after": after, "cursor": cursor, "up_to": up_to})
        return Counter({(verdict, reason): number for verdict, reason, number in rows})


def _reasons(said: Mapping[tuple[str, str], int], kinds: Sequence[str]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (kind, reason), number in said.items():
        found[reason] += number if kind in kinds and reason else 0
    return {reason: found[reason] for reason in sorted(found) if found[reason]}


def _example(row: sqlite3.Row) -> Example:
    ids = {name: unpack(row[name]) for name in ("prompt_ids", "target_ids")}
    return Example(**{**dict(row), **ids})


def _receipt(feedback_id: str, unusable: str, feedback: Feedback) -> Receipt:
    """The receipt. Nothing can be learnt from feedback without a verdict either."""
    score = feedback.score
    offers = feedback.correction is not None or (
        score is not None and (score >= LIKED or score < DISLIKED)
    )
    return Receipt(feedback_id, unusable if offers else NO_VERDICT)
