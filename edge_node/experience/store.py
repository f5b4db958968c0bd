"""The durable store of interactions and feedback.

In: finished answers with their token ids, and feedback. Out: examples for training, a cursor,
counts. Guarantees: every write is one durable SQLite transaction, safe with several processes on
the same file; repeats change nothing; only what can be learnt is an example.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_node.errors import UnknownInteraction
from edge_node.experience.browsing import Browsing
from edge_node.experience.comparisons import Preference, Scores, write_preference, write_scores
from edge_node.experience.database import (
    BUSY_TIMEOUT_S,
    pack,
    pack_logprobs,
    unpack,
    unpack_logprobs,
)
from edge_node.experience.given import Waited
from edge_node.experience.records import (
    ANYONE,
    Choice,
    Counts,
    EpisodeFeedback,
    Interaction,
    Receipt,
    Teller,
)
from edge_node.experience.sealing import CLEAR, Sealing
from edge_node.experience.verdicts import VERDICT, VERDICTS, write_episode, write_verdict
from edge_node.experience.waiting import Said, keep_waiting, read_said, that_wait

TAUGHT = ("correction", "liked")
"""Verdicts that make an example of an answer."""
WHOLE = """
SELECT id, created_at, model, endpoint, finish_reason, unseal(messages) AS messages,
       unseal(answer) AS answer, unseal(prompt_ids) AS prompt_ids, unseal(answer_ids) AS answer_ids,
       unusable, redacted
FROM interactions WHERE id = ?
"""
SPOKEN_OF_SINCE = """
AND f.interaction_id IN (
    SELECT interaction_id FROM feedback WHERE number > :after AND number <= :cursor
)
"""


class ExperienceStore(Browsing):
    """All of the experience."""

    def __init__(
        self, path: Path, *, busy_timeout_s: float = BUSY_TIMEOUT_S, sealing: Sealing = CLEAR
    ) -> None:
        super().__init__(path, busy_timeout_s=busy_timeout_s, sealing=sealing)
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
                pack(row.answer_ids), row.unusable, " ".join(row.redacted),
            )
            for row in rows
        ]  # fmt: skip
        choices = [
            (row.id, position, pack(choice.answer_ids), pack_logprobs(choice.logprobs))
            for row in rows
            for position, choice in enumerate(row.choices)
        ]
        users = [(row.id, row.user) for row in rows if row.user is not None]
        labels = [
            (row.id, row.episode, row.environment)
            for row in rows
            if row.episode is not None or row.environment is not None
        ]
        with self._transaction() as db:
            db.executemany(
                "INSERT OR IGNORE INTO interactions SELECT ?1, ?2, ?3, ?4, ?5, seal(?6), seal(?7), "
                "seal(?8), seal(?9), ?10, ?11 WHERE NOT EXISTS (SELECT 1 FROM deleted WHERE id = "
                "?1)",
                values,
            )
            db.executemany(
                "INSERT OR IGNORE INTO choices SELECT ?1, ?2, seal(?3), seal(?4) WHERE EXISTS "
                "(SELECT 1 FROM interactions WHERE id = ?1)",
                choices,
            )
            db.executemany(
                "INSERT OR IGNORE INTO users SELECT ?1, ?2 WHERE EXISTS (SELECT 1 FROM "
                "interactions WHERE id = ?1)",
                users,
            )
            db.executemany(
                "INSERT OR IGNORE INTO labels SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM "
                "interactions WHERE id = ?1)",
                labels,
            )
            _join(db, [row.id for row in rows])

    def give(self, said: Said, *, max_tokens: int, teller: Teller = ANYONE) -> Receipt:
        """Makes any feedback durable, now or with the answers under way that it waits for.

        Raises as `add_feedback`, `add_preference`, `add_scores` and `add_episode_feedback`.
        """

        def write(db: sqlite3.Connection) -> Receipt:
            try:
                return _write(db, said, teller.user, max_tokens)
            except UnknownInteraction as error:
                if error.interaction_id not in teller.expects:
                    raise
                return keep_waiting(db, said, teller, max_tokens)

        return self._give(teller, write)

    def interaction(self, interaction_id: str) -> Interaction | None:
        rows = self._query(WHOLE, (interaction_id,))
        if not rows:
            return None
        fields = dict(rows[0])
        ids = {name: unpack(fields[name]) for name in ("prompt_ids", "answer_ids")}
        fields |= {"messages": json.loads(fields["messages"]), "user": self._user(interaction_id)}
        fields |= self.labels(interaction_id) | {"redacted": tuple(fields["redacted"].split())}
        choices = self._query(
            "SELECT unseal(answer_ids) AS answer_ids, unseal(logprobs) AS logprobs FROM choices "
            "WHERE interaction_id = ? ORDER BY position",
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
            deleted = self.deleted() + self.removed()
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


def _write(
    db: sqlite3.Connection,
    said: Said,
    user: str | None,
    max_tokens: int,
    waited: Waited | None = None,
) -> Receipt:
    if isinstance(said, Preference):
        return write_preference(db, said, user, max_tokens, waited)
    if isinstance(said, Scores):
        return write_scores(db, said, user, max_tokens, waited)
    if isinstance(said, EpisodeFeedback):
        return write_episode(db, said, user, max_tokens)
    return write_verdict(db, said, user, max_tokens, waited)


def _join(db: sqlite3.Connection, ids: Sequence[str]) -> None:
    """What waited for these answers is feedback from now on; what does not fit them says why."""
    for row in that_wait(db, ids):
        try:
            waited = row["id"], row["created_at"]
            _write(db, read_said(row), row["user"], row["max_tokens"], waited)
        except UnknownInteraction:  # it waits for another one too
            continue
        except ValueError as error:
            db.execute("UPDATE waiting SET refused = ? WHERE id = ?", (str(error), row["id"]))
        else:
            db.execute("DELETE FROM waiting WHERE id = ?", (row["id"],))
