"""Feedback whose answers are under way, until they are stored.

In: what was said, or ids of answers that were stored just now. Out: a receipt; rows to join. The
caller's transaction makes both durable together, so nothing that was acknowledged is lost. Feedback
whose answer never comes stays, and is shown as waiting.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict

from edge_node.experience.comparisons import Answer, Preference, Scores
from edge_node.experience.given import WAITING, expect_interaction, new_said
from edge_node.experience.records import EpisodeFeedback, Feedback, Receipt, Teller

Said = Feedback | EpisodeFeedback | Preference | Scores


def interactions_of(said: Said) -> list[str]:
    """Ids of the interactions that it judges: one, or the chosen one's and the rejected one's.

    None for what is said of an episode.
    """
    if isinstance(said, EpisodeFeedback):
        return []
    if isinstance(said, Preference):
        return [said.chosen.interaction_id, said.rejected.interaction_id]
    return [said.interaction_id]


def keep_waiting(db: sqlite3.Connection, said: Said, teller: Teller, max_tokens: int) -> Receipt:
    """Keeps `said` until its answers are stored; the same again right after has the same id.

    Raises UnknownInteraction for an answer that is neither stored nor under way.
    """
    about = interactions_of(said)
    for interaction_id in about:
        if interaction_id not in teller.expects:
            expect_interaction(db, interaction_id, teller.user)
    first, second, text = about[0], about[1] if about[1:] else "", _write(said)
    newest = db.execute(
        "SELECT id, user, unseal(said) FROM waiting WHERE first = ? AND second = ? AND refused = "
        "'' ORDER BY created_at DESC, id LIMIT 1",
        (first, second),
    ).fetchone()
    if newest is not None and tuple(newest)[1:] == (teller.user, text):
        return Receipt(newest["id"], "", waits=True, answers=len(set(about)))
    feedback_id, at = new_said()
    db.execute(
        "INSERT INTO waiting VALUES (?, ?, ?, ?, ?, seal(?), ?, '')",
        (feedback_id, at, teller.user, first, second, text, max_tokens),
    )
    return Receipt(feedback_id, "", waits=True, answers=len(set(about)))


def that_wait(db: sqlite3.Connection, ids: Sequence[str]) -> list[sqlite3.Row]:
    """What waits for any of these answers, in the order it came."""
    among = "(SELECT value FROM json_each(:ids))"
    return db.execute(
        f"{WAITING} WHERE refused = '' AND (first IN {among} OR second IN {among}) "
        "ORDER BY created_at, id",
        {"ids": json.dumps(ids)},
    ).fetchall()


def read_said(row: sqlite3.Row) -> Said:
    """What was kept in a row of `waiting`."""
    fields = json.loads(row["said"])
    del fields["kind"]
    if "chosen" in fields:
        return Preference(Answer(*fields["chosen"]), Answer(*fields["rejected"]))
    if "scores" in fields:
        return Scores(fields["interaction_id"], tuple(fields["scores"]))
    ids = fields["correction_ids"]
    return Feedback(**{**fields, "correction_ids": None if ids is None else tuple(ids)})


def _write(said: Said) -> str:
    fields = asdict(said)
    if isinstance(said, Preference):
        for name, answer in (("chosen", said.chosen), ("rejected", said.rejected)):
            fields[name] = [answer.interaction_id, answer.choice]
        kind = "preference"
    else:
        kind = said.kind if isinstance(said, Feedback) else "group"
    return json.dumps(fields | {"kind": kind})
