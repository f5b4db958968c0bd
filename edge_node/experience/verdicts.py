"""What is said of one answer, or of all answers of an episode, and what it teaches.

In: thumbs, scores, corrections and comments. Out: examples and thumbs for training, counts of news.
Guarantees: of all that is said of an answer one verdict counts, whatever the order it came in: a
correction before a score, what was said of the answer before what was said of its episode, then the
newest. What is outranked is kept and is no news.
"""

from __future__ import annotations

import json
import sqlite3

from edge_node.errors import UnknownEpisode
from edge_node.experience.comparisons import Comparisons
from edge_node.experience.database import TOKEN_BYTES, pack, unpack
from edge_node.experience.given import Waited, expect_interaction, new_said
from edge_node.experience.records import (
    ANYONE,
    EpisodeFeedback,
    Example,
    Feedback,
    Receipt,
    Teller,
    Thumb,
)
from edge_node.experience.replay import draw
from edge_node.experience.usable import (
    DISLIKED,
    LIKED,
    NO_VERDICT,
    REDACTED,
    why_redacted,
    why_unusable,
)

# The verdict on each answer, usable or not. A comment alone is none.
VERDICTS = """
FROM feedback f JOIN interactions i ON i.id = f.interaction_id
WHERE f.number = (
    SELECT said.number FROM feedback said
    WHERE said.interaction_id = f.interaction_id AND said.number <= :up_to
      AND (said.correction IS NOT NULL OR said.score IS NOT NULL)
    ORDER BY said.correction IS NULL, said.part_of IS NOT NULL, said.number DESC LIMIT 1
)
"""
VERDICT = f"""
CASE WHEN f.correction IS NOT NULL THEN 'correction' WHEN f.score >= {LIKED} THEN 'liked'
     WHEN f.score < {DISLIKED} THEN 'disliked' ELSE 'undecided' END
"""
_EXAMPLE = """
SELECT f.id AS feedback_id, i.id AS interaction_id, i.model, unseal(i.prompt_ids) AS prompt_ids,
       unseal(CASE WHEN f.correction IS NULL THEN i.answer_ids ELSE f.correction_ids END)
       AS target_ids,
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
SELECT unseal(i.prompt_ids) AS prompt_ids, unseal(i.answer_ids) AS answer_ids {VERDICTS}
AND f.unusable = '' AND {VERDICT} = :verdict ORDER BY f.number DESC LIMIT :limit
"""
NEWS = f"""
SELECT COUNT(*) {VERDICTS} AND f.number > :after AND (:model IS NULL OR i.model = :model)
"""
LAST = 2**62
"""A cursor after all feedback."""
EPISODE = """
SELECT i.id, i.unusable, i.redacted, LENGTH(unseal(i.prompt_ids)) AS prompt,
       LENGTH(unseal(i.answer_ids)) AS answer
FROM labels l JOIN interactions i ON i.id = l.interaction_id
LEFT JOIN users u ON u.interaction_id = i.id
WHERE l.episode = :episode AND (:user IS NULL OR u.user = :user)
ORDER BY i.created_at, i.id
"""
SAID_OF_EPISODE = """
SELECT part_of, score, unseal(comment), COUNT(*) FROM feedback
WHERE part_of IS NOT NULL AND user IS :user AND interaction_id IN (
    SELECT interaction_id FROM labels WHERE episode = :episode
)
GROUP BY part_of ORDER BY MAX(number) DESC LIMIT 1
"""


class Verdicts(Comparisons):
    """The part of the experience store that judges single answers."""

    def add_feedback(
        self, feedback: Feedback, *, max_tokens: int, teller: Teller = ANYONE
    ) -> Receipt:
        """Makes `feedback` durable; the same again right after gives the same receipt.

        Raises UnknownInteraction, KeyReused.

        max_tokens: most tokens of prompt and answer together that can be learnt.
        """
        return self._give(teller, lambda db: write_verdict(db, feedback, teller.user, max_tokens))

    def add_episode_feedback(
        self, feedback: EpisodeFeedback, *, max_tokens: int, teller: Teller = ANYONE
    ) -> Receipt:
        """Makes `feedback` durable for each answer that the episode has now.

        The same again right after gives the same receipt. A teller with a user reaches the answers
        to that user. Raises UnknownEpisode, KeyReused.
        """
        return self._give(teller, lambda db: write_episode(db, feedback, teller.user, max_tokens))

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
        return self._news(
            "CASE WHEN f.correction IS NULL THEN f.score < 1 ELSE f.unusable = '' END", after, model
        )

    def judged(self, *, after: int, model: str) -> int:
        """Answers of `model` whose verdict came after cursor `after`."""
        return self._news("TRUE", after, model)

    def corrections(self, *, after: int, model: str) -> int:
        """Answers of `model` with a usable correction after cursor `after`."""
        return self._news("f.correction IS NOT NULL AND f.unusable = ''", after, model)

    def dislikes(self, *, after: int, model: str) -> int:
        """Usable answers of `model` that were disliked after cursor `after`."""
        return self._news(f"{VERDICT} = 'disliked' AND f.unusable = ''", after, model)

    def _news(self, condition: str, after: int, model: str | None) -> int:
        return self._count(
            f"{NEWS} AND {condition}", {"after": after, "model": model, "up_to": LAST}
        )


def write_verdict(
    db: sqlite3.Connection,
    feedback: Feedback,
    user: str | None,
    max_tokens: int,
    waited: Waited | None = None,
) -> Receipt:
    """The part of `add_feedback` in a transaction.

    `waited`: feedback that was acknowledged before has its id and time.
    """
    expect_interaction(db, feedback.interaction_id, user)
    content = (feedback.score, feedback.correction, feedback.comment)
    known, redacted, prompt, answer = db.execute(
        "SELECT unusable, redacted, LENGTH(unseal(prompt_ids)), LENGTH(unseal(answer_ids)) FROM "
        "interactions WHERE id = ?",
        (feedback.interaction_id,),
    ).fetchone()
    target_tokens: int | None = answer // TOKEN_BYTES
    if feedback.correction is None:
        known = why_redacted(known, redacted)
    else:
        known = known or (REDACTED if feedback.redacted else "")
        ids = feedback.correction_ids
        target_tokens = None if ids is None else len(ids)
    unusable = why_unusable(known, prompt // TOKEN_BYTES, target_tokens, max_tokens)
    newest = db.execute(
        "SELECT id, score, unseal(correction), unseal(comment), unusable, kind, user, part_of FROM "
        "feedback WHERE interaction_id = ? ORDER BY number DESC LIMIT 1",
        (feedback.interaction_id,),
    ).fetchone()
    said = (*content, unusable, feedback.kind, user, None)
    if waited is None and newest is not None and tuple(newest)[1:] == said:
        return _receipt(newest["id"], unusable, feedback)
    feedback_id, at = waited or new_said()
    db.execute(
        "INSERT INTO feedback (id, created_at, interaction_id, score, correction, comment, "
        "correction_ids, unusable, kind, user) VALUES (?, ?, ?, ?, seal(?), seal(?), seal(?), ?, "
        "?, ?)",
        (
            feedback_id, at, feedback.interaction_id, *content,
            pack(feedback.correction_ids or ()), unusable, feedback.kind, user,
        ),
    )  # fmt: skip
    return _receipt(feedback_id, unusable, feedback)


def write_episode(
    db: sqlite3.Connection, feedback: EpisodeFeedback, user: str | None, max_tokens: int
) -> Receipt:
    """The part of `add_episode_feedback` in a transaction: a row for each answer."""
    of_it = {"episode": feedback.episode, "user": user}
    rows = db.execute(EPISODE, of_it).fetchall()
    if not rows:
        raise UnknownEpisode(feedback.episode)
    reasons = [
        why_unusable(
            why_redacted(row["unusable"], row["redacted"]),
            row["prompt"] // TOKEN_BYTES,
            row["answer"] // TOKEN_BYTES,
            max_tokens,
        )
        for row in rows
    ]
    each = Feedback("", feedback.score, None, feedback.comment, (), feedback.form)
    unusable = "" if "" in reasons else reasons[0]
    newest = db.execute(SAID_OF_EPISODE, of_it).fetchone()
    content = (feedback.score, feedback.comment, len(rows))
    if newest is not None and tuple(newest)[1:] == content:
        return _receipt(newest["part_of"], unusable, each, len(rows))
    feedback_id, at = new_said()
    db.executemany(
        "INSERT INTO feedback (id, created_at, interaction_id, score, comment, correction_ids, "
        "unusable, kind, user, part_of) VALUES (?, ?, ?, ?, seal(?), X'', ?, ?, ?, ?)",
        [
            (
                f"{feedback_id}.{place}", at, row["id"], feedback.score, feedback.comment, reason,
                each.kind, user, feedback_id,
            )
            for place, (row, reason) in enumerate(zip(rows, reasons, strict=True))
        ],
    )  # fmt: skip
    return _receipt(feedback_id, unusable, each, len(rows))


def _example(row: sqlite3.Row) -> Example:
    ids = {name: unpack(row[name]) for name in ("prompt_ids", "target_ids")}
    return Example(**{**dict(row), **ids})


def _receipt(feedback_id: str, unusable: str, feedback: Feedback, answers: int = 1) -> Receipt:
    """The receipt. Nothing can be learnt from feedback without a verdict either."""
    score = feedback.score
    offers = feedback.correction is not None or (
        score is not None and (score >= LIKED or score < DISLIKED)
    )
    return Receipt(feedback_id, unusable if offers else NO_VERDICT, answers=answers)
