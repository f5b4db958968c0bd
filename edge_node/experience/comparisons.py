"""What users say of several answers: which of two is better, or a score for each of a group.

In: preferences, and scores of the choices of one request. Out: pairs and groups for training, in
the token ids that were served, with the log-probabilities that the engine had; counts. Guarantees:
each is feedback with a number of its own, so the cursor counts it; of the same two answers, or of
the same group, the newest word counts; what refers to an answer that is not there changes nothing.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_node.experience.database import TOKEN_BYTES, unpack, unpack_logprobs
from edge_node.experience.given import Given, Waited, expect_interaction, new_said
from edge_node.experience.records import ANYONE, Receipt, Teller
from edge_node.experience.usable import (
    NO_LOGPROBS,
    REDACTED,
    SAME_ANSWERS,
    SAME_SCORES,
    why_redacted,
    why_unusable,
)

Kind = Literal["preference", "group"]
SAME = 1e-6
"""Scores of one group that differ by less are the same."""
NEWEST = """
FROM comparisons c JOIN feedback f ON f.number = c.number
JOIN interactions i ON i.id = f.interaction_id
WHERE c.number = (
    SELECT MAX(newest.number) FROM comparisons newest
    WHERE newest.kind = c.kind AND newest.subject = c.subject AND newest.number <= :up_to
)
"""


@dataclass(frozen=True)
class Answer:
    """One answer that was served: an interaction's, or one of its choices."""

    interaction_id: str
    choice: int = 0

    def __str__(self) -> str:
        return f"{self.interaction_id}#{self.choice}"


@dataclass(frozen=True)
class Preference:
    """`chosen` is better than `rejected`; both answer the same prompt."""

    chosen: Answer
    rejected: Answer


@dataclass(frozen=True)
class Scores:
    """A score for each choice of one request, in order; finite, and only their order and distances
    within the group matter.
    """

    interaction_id: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class About:
    """What a comparison is of, and who gave it. Of one subject the newest counts."""

    kind: Kind
    interaction_id: str
    subject: str
    user: str | None


@dataclass(frozen=True)
class Pair:
    """A preference in token ids."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Scored answers to one prompt. logprobs: of each token of each answer, natural."""

    interaction_id: str
    prompt_ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]


class Comparisons(Given):
    """The part of the experience store that compares answers."""

    def add_preference(
        self, preference: Preference, *, max_tokens: int, teller: Teller = ANYONE
    ) -> Receipt:
        """Makes `preference` durable; the same again right after gives the same receipt.

        Raises UnknownInteraction, KeyReused; ValueError when the two are one, answer different
        prompts, or a choice was not kept.

        max_tokens: as in add_feedback.
        """
        return self._give(
            teller, lambda db: write_preference(db, preference, teller.user, max_tokens)
        )

    def add_scores(self, scores: Scores, *, max_tokens: int, teller: Teller = ANYONE) -> Receipt:
        """Makes the scores of a group durable; the same again right after gives the same receipt.

        Raises UnknownInteraction, KeyReused; ValueError when there is not one finite score for each
        of two or more choices.
        """
        return self._give(teller, lambda db: write_scores(db, scores, teller.user, max_tokens))

    def pairs(self, *, up_to: int, limit: int) -> list[Pair]:
        """Usable preferences known at cursor `up_to`, newest first."""
        made = []
        for row in self._newest("preference", up_to, limit):
            said = json.loads(row["said"])
            chosen, rejected = (self._answer_ids(*said[name]) for name in ("chosen", "rejected"))
            if chosen is not None and rejected is not None:  # deleted meanwhile
                made.append(Pair(unpack(row["prompt_ids"]), unpack(chosen), unpack(rejected)))
        return made

    def groups(self, *, up_to: int, limit: int, model: str) -> list[Group]:
        """Usable scored groups of answers by the version `model`, known at cursor `up_to`, newest
        first. Those of other versions are stale.
        """
        made = []
        for row in self._newest("group", up_to, limit, model):
            choices = self._query(
                "SELECT unseal(answer_ids) AS answer_ids, unseal(logprobs) AS logprobs FROM "
                "choices WHERE interaction_id = ? ORDER BY position",
                (row["id"],),
            )
            scores = tuple(json.loads(row["said"])["scores"])
            if len(choices) == len(scores):
                made.append(
                    Group(
                        row["id"],
                        unpack(row["prompt_ids"]),
                        tuple(unpack(choice["answer_ids"]) for choice in choices),
                        tuple(unpack_logprobs(choice["logprobs"]) for choice in choices),
                        scores,
                    )
                )
        return made

    def new_comparisons(self, kind: Kind, *, after: int, model: str | None = None) -> int:
        """Usable ones after cursor `after`; `model`: of answers of that version only."""
        return self._count(
            "SELECT COUNT(*) FROM comparisons c JOIN feedback f ON f.number = c.number JOIN "
            "interactions i ON i.id = f.interaction_id WHERE c.number > :after AND c.kind = :kind "
            "AND f.unusable = '' AND (:model IS NULL OR i.model = :model)",
            {"after": after, "kind": kind, "model": model},
        )

    def count_groups(self, *, up_to: int, model: str) -> int:
        """Usable scored groups of answers by the version `model`, known at cursor `up_to`."""
        return self._count(
            f"SELECT COUNT(*) {NEWEST} AND c.kind = 'group' AND f.unusable = '' AND i.model = "
            ":model",
            {"up_to": up_to, "model": model},
        )

    def comparisons_since(self, after: int, cursor: int, *, up_to: int) -> Counter[tuple[str, str]]:
        """Of what was compared in (after, cursor]: number by kind and why it cannot be used (empty:
        it can), as known at `up_to`.
        """
        rows = self._query(
            f"SELECT c.kind, f.unusable, COUNT(*) {NEWEST} AND (c.kind, c.subject) IN (SELECT "
            "kind, subject FROM comparisons WHERE number > :after AND number <= :cursor) GROUP BY "
            "c.kind, f.unusable",
            {"after": after, "cursor": cursor, "up_to": up_to},
        )
        return Counter({(kind, reason): number for kind, reason, number in rows})

    def _newest(
        self, kind: Kind, up_to: int, limit: int, model: str | None = None
    ) -> Iterator[sqlite3.Row]:
        yield from self._query(
            f"SELECT i.id, unseal(i.prompt_ids) AS prompt_ids, c.said {NEWEST} AND c.kind = :kind "
            "AND f.unusable = '' AND (:model IS NULL OR i.model = :model) ORDER BY c.number DESC "
            "LIMIT :limit",
            {"up_to": up_to, "kind": kind, "limit": limit, "model": model},
        )

    def _answer_ids(self, interaction_id: str, choice: int) -> bytes | None:
        rows = self._query(ANSWER, {"id": interaction_id, "choice": choice})
        return None if not rows else rows[0]["answer_ids"]


ANSWER = """
SELECT i.unusable, unseal(i.prompt_ids) AS prompt_ids,
       unseal(COALESCE(c.answer_ids, i.answer_ids)) AS answer_ids, i.redacted
FROM interactions i LEFT JOIN choices c ON c.interaction_id = i.id AND c.position = :choice
WHERE i.id = :id AND (:choice = 0 OR c.position IS NOT NULL)
"""


def write_preference(
    db: sqlite3.Connection,
    preference: Preference,
    user: str | None,
    max_tokens: int,
    waited: Waited | None = None,
) -> Receipt:
    """The part of `add_preference` in a transaction. `waited`: as in `_add`."""
    chosen, rejected = preference.chosen, preference.rejected
    if chosen == rejected:
        raise ValueError(
            f"chosen and rejected are the same answer, {chosen}; expected two answers."
        )
    for answer in (chosen, rejected):
        expect_interaction(db, answer.interaction_id, user)
    found = [_found(db, "chosen", chosen), _found(db, "rejected", rejected)]
    (known, prompt, first), (known_too, prompt_too, second) = found
    if not (known or known_too) and prompt != prompt_too:
        raise ValueError(
            f"chosen {chosen} and rejected {rejected} answer different prompts; expected "
            "two answers to the same messages."
        )
    unusable = next(
        filter(None, (_why(one, max_tokens) for one in found)),
        SAME_ANSWERS if first == second else "",
    )
    subject = " ".join(sorted((str(chosen), str(rejected))))
    said = {"chosen": _said(chosen), "rejected": _said(rejected)}
    about = About("preference", chosen.interaction_id, subject, user)
    return _add(db, about, said, unusable, waited)


def write_scores(
    db: sqlite3.Connection,
    scores: Scores,
    user: str | None,
    max_tokens: int,
    waited: Waited | None = None,
) -> Receipt:
    """The part of `add_scores` in a transaction. `waited`: as in `_add`."""
    expect_interaction(db, scores.interaction_id, user)
    rows = db.execute(
        "SELECT CASE WHEN i.unusable = '' AND i.redacted <> '' THEN :redacted ELSE i.unusable END, "
        "unseal(i.prompt_ids), unseal(c.answer_ids) AS answer_ids, unseal(c.logprobs) AS logprobs "
        "FROM choices c JOIN interactions i ON i.id = c.interaction_id WHERE i.id = :id ORDER BY "
        "c.position",
        {"id": scores.interaction_id, "redacted": REDACTED},
    ).fetchall()
    if len(rows) < 2:
        raise ValueError(
            f"The request of answer {scores.interaction_id} has one choice; scores are for "
            "a request with n of 2 or more. Send `score` for a single answer."
        )
    if len(rows) != len(scores.scores):
        raise ValueError(
            f"scores has {len(scores.scores)} items; expected {len(rows)}, one for each "
            f"choice of answer {scores.interaction_id}, in the order of `index`."
        )
    if not all(map(math.isfinite, scores.scores)):
        raise ValueError("scores holds a number that is not finite; expected finite ones.")
    unusable = next(
        filter(None, (_why(tuple(row)[:3], max_tokens) for row in rows)),
        NO_LOGPROBS
        if any(len(row["logprobs"]) != len(row["answer_ids"]) for row in rows)
        else SAME_SCORES
        if max(scores.scores) - min(scores.scores) < SAME
        else "",
    )
    about = About("group", scores.interaction_id, scores.interaction_id, user)
    return _add(db, about, {"scores": scores.scores}, unusable, waited)


def _found(db: sqlite3.Connection, name: str, answer: Answer) -> tuple[str, bytes, bytes]:
    """Why the answer is unusable, its prompt, its ids."""
    row = db.execute(ANSWER, {"id": answer.interaction_id, "choice": answer.choice}).fetchone()
    if row is None:
        raise ValueError(
            f"{name} is choice {answer.choice} of answer {answer.interaction_id}, which was not "
            "kept; expected the `index` of one of its choices."
        )
    why = why_redacted(row["unusable"], row["redacted"], answer.choice)
    return why, row["prompt_ids"], row["answer_ids"]


def _why(found: Sequence[Any], max_tokens: int) -> str:
    known, prompt, ids = found
    return why_unusable(known, len(prompt) // TOKEN_BYTES, len(ids) // TOKEN_BYTES, max_tokens)


def _said(answer: Answer) -> list[Any]:
    return [answer.interaction_id, answer.choice]


def _add(
    db: sqlite3.Connection,
    about: About,
    said: dict[str, Any],
    unusable: str,
    waited: Waited | None,
) -> Receipt:
    """`waited`: feedback that was acknowledged before has its id and time."""
    document = json.dumps(said)
    newest = db.execute(
        "SELECT f.id, c.said, f.unusable, f.user FROM comparisons c JOIN feedback f ON f.number = "
        "c.number WHERE c.kind = ? AND c.subject = ? ORDER BY c.number DESC LIMIT 1",
        (about.kind, about.subject),
    ).fetchone()
    repeats = newest is not None and tuple(newest)[1:] == (document, unusable, about.user)
    if repeats and waited is None:
        return Receipt(newest["id"], unusable)
    feedback_id, at = waited or new_said()
    number = db.execute(
        "INSERT INTO feedback (id, created_at, interaction_id, correction_ids, unusable, kind, "
        "user) VALUES (?, ?, ?, X'', ?, ?, ?)",
        (feedback_id, at, about.interaction_id, unusable, about.kind, about.user),
    ).lastrowid
    db.execute(
        "INSERT INTO comparisons VALUES (?, ?, ?, ?)",
        (number, about.kind, about.subject, document),
    )
    return Receipt(feedback_id, unusable)
