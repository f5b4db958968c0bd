"""The tables of the experience store's file, version by version.

In: an open file and its version. Out: the tables of SCHEMA_VERSION. Guarantees: nothing that was
stored is lost; the caller's transaction makes it whole or not at all.
"""

from __future__ import annotations

import sqlite3

SCHEMA_VERSION = 5
OLDEST = 2
"""The first version that is still read."""
SCHEMA = """
CREATE TABLE interactions (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, model TEXT NOT NULL, endpoint TEXT NOT NULL,
    finish_reason TEXT NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL,
    prompt_ids BLOB NOT NULL, answer_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at TEXT NOT NULL,
    interaction_id TEXT NOT NULL REFERENCES interactions (id), score REAL, correction TEXT,
    comment TEXT, correction_ids BLOB NOT NULL, unusable TEXT NOT NULL
);
CREATE INDEX feedback_of_interaction ON feedback (interaction_id, number);
"""
# Version 3 adds these four. choices: all of an interaction with several, the first one included.
# comparisons: feedback on several answers; the newest of a subject counts. deleted: interactions
# that were deleted and cannot come back. users: of the access keys that asked.
ADDED = """
CREATE TABLE choices (
    interaction_id TEXT NOT NULL REFERENCES interactions (id), position INTEGER NOT NULL,
    answer_ids BLOB NOT NULL, logprobs BLOB NOT NULL, PRIMARY KEY (interaction_id, position)
) WITHOUT ROWID;
CREATE TABLE comparisons (
    number INTEGER PRIMARY KEY REFERENCES feedback (number), kind TEXT NOT NULL,
    subject TEXT NOT NULL, said TEXT NOT NULL
);
CREATE INDEX comparisons_of_subject ON comparisons (kind, subject, number);
CREATE TABLE deleted (id TEXT PRIMARY KEY, at TEXT NOT NULL);
CREATE TABLE users (
    interaction_id TEXT PRIMARY KEY REFERENCES interactions (id), user TEXT NOT NULL
) WITHOUT ROWID;
"""
# Version 4. feedback: its kind, who gave it, and of what is said of an episode the feedback that
# this row is a part of. labels: what the client says of a request. waiting: feedback whose answers
# are under way. sent: what idempotency keys were answered. withdrawn: feedback that was deleted.
FEEDBACK = """
ALTER TABLE feedback ADD COLUMN kind TEXT NOT NULL DEFAULT '';
ALTER TABLE feedback ADD COLUMN user TEXT;
ALTER TABLE feedback ADD COLUMN part_of TEXT;
UPDATE feedback SET kind = COALESCE(
    (SELECT c.kind FROM comparisons c WHERE c.number = feedback.number),
    CASE WHEN correction IS NOT NULL THEN 'correction' WHEN score IS NOT NULL THEN 'score'
         ELSE 'comment' END
);
CREATE INDEX feedback_of_episode ON feedback (part_of) WHERE part_of IS NOT NULL;
CREATE INDEX rejected_answers ON comparisons (json_extract(said, '$.rejected[0]'));
CREATE TABLE labels (
    interaction_id TEXT PRIMARY KEY REFERENCES interactions (id), episode TEXT, environment TEXT
) WITHOUT ROWID;
CREATE INDEX labels_of_episode ON labels (episode) WHERE episode IS NOT NULL;
CREATE TABLE waiting (
    id TEXT PRIMARY KEY, created_at TEXT NOT NULL, user TEXT, first TEXT NOT NULL,
    second TEXT NOT NULL, said TEXT NOT NULL, max_tokens INTEGER NOT NULL, refused TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX waiting_first ON waiting (first);
CREATE INDEX waiting_second ON waiting (second);
CREATE TABLE sent (
    sender TEXT NOT NULL, key TEXT NOT NULL, digest TEXT NOT NULL, feedback_id TEXT NOT NULL,
    receipt TEXT NOT NULL, at TEXT NOT NULL, PRIMARY KEY (sender, key)
) WITHOUT ROWID;
CREATE INDEX sent_at ON sent (at);
CREATE INDEX sent_of_feedback ON sent (feedback_id);
CREATE TABLE withdrawn (
    id TEXT PRIMARY KEY, number INTEGER, user TEXT, at TEXT NOT NULL
) WITHOUT ROWID;
"""
# Version 5. redacted: parts of an interaction whose ids are not those served ("prompt", numbers of
# choices). removed: what retention took out, newest last. keys: of those that sealed.
KEPT = """
ALTER TABLE interactions ADD COLUMN redacted TEXT NOT NULL DEFAULT '';
CREATE INDEX interactions_of_time ON interactions (created_at, id);
CREATE TABLE removed (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, at TEXT NOT NULL,
    why TEXT NOT NULL
);
CREATE TABLE keys (id TEXT PRIMARY KEY) WITHOUT ROWID;
"""
STEPS = ((2, SCHEMA), (3, ADDED), (4, FEEDBACK), (5, KEPT))
"""Version, and what makes it of the one before."""


def upgrade(db: sqlite3.Connection, version: int) -> None:
    """Makes the tables of SCHEMA_VERSION of those of `version`; 0: there are none."""
    for made, statements in STEPS:
        if version < made:
            for statement in statements.split(";"):
                db.execute(statement)
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
