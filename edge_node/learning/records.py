"""The node's rounds: what each one is, durable before it trains, and how it ended.

In: a RoundPlan. Out: the unfinished plan after a crash, the last cursor, a working directory per
round. SQLite (WAL, synchronous=FULL). Guarantees: a plan fixes all that a round's update depends
on, so a resumed round makes the same bytes.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from edge_node.errors import StorageError
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policy import RICHEST, Method

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    number INTEGER PRIMARY KEY,
    round_id TEXT NOT NULL UNIQUE,
    start_release TEXT NOT NULL,
    cursor INTEGER NOT NULL,
    plan BLOB NOT NULL,
    state TEXT NOT NULL,
    result TEXT NOT NULL DEFAULT '',
    changed_at TEXT NOT NULL
)
"""
_WANTED = """
CREATE TABLE IF NOT EXISTS wanted (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    method TEXT NOT NULL,
    asked_at TEXT NOT NULL
)
"""
"""The round that an operator asked for (orders.py): one row at most."""
_OBSOLETE = "obsolete"
"""Beginning of why a round was dropped."""
_WAS_DROPPED = f"state = 'given up' AND result LIKE '{_OBSOLETE} %'"

_EXPLORED = (
    "json_extract(CAST(plan AS TEXT), '$.grpo') IS NOT NULL AND "
    "json_extract(CAST(plan AS TEXT), '$.feedback') IS NULL"
)
"""Of a grpo round."""


class RoundImpossible(LookupError):
    """A round that can never be completed. Its words quote nothing that a customer wrote."""

    def __init__(self, text: str, next_step: str) -> None:
        super().__init__(text)
        self.next_step = next_step


class NoGain(Exception):
    """The round's result is no better than its start, or the local gate stops it. Its words say
    why, in counts, and quote nobody.
    """


class NothingToGain(NoGain):
    """All answers got the same reward: another round from its start would do no better."""


class NoReward(NothingToGain):
    """They all scored zero: a round from its start finds nothing to reinforce."""


@dataclass(frozen=True)
class RoundEnd:
    """state: training, finished, abandoned, given up, no reward, nothing to gain, cancelled.

    result: update id or why. changed_at: ISO 8601, UTC.
    """

    plan: RoundPlan
    state: str
    result: str
    changed_at: str


class RoundStore:
    """Owner of `learning/` in the data directory."""

    def __init__(self, path: Path, *, busy_timeout_s: float = 30) -> None:
        self._path = path
        self._busy_timeout_s = busy_timeout_s
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self.transaction() as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(_SCHEMA)
                database.execute(_WANTED)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"Cannot open the round records in {path}: {error}. EDGE_DATA_DIR must be "
                "writable, with free space."
            ) from error

    def begin(self, plan: RoundPlan) -> None:
        """On disk when this returns, and an operator's wish for such a round is met.

        Raises ValueError when another round is unfinished.
        """
        with self.transaction() as database:
            database.execute("BEGIN IMMEDIATE")
            other = database.execute(
                "SELECT round_id FROM rounds WHERE state = 'training'"
            ).fetchone()
            if other is not None:
                raise ValueError(
                    f"Round {other[0]} is unfinished; round {plan.round_id} has to wait for it."
                )
            database.execute(
                "INSERT INTO rounds (number, round_id, start_release, cursor, plan, state, "
                "changed_at) VALUES (?, ?, ?, ?, ?, 'training', ?)",
                (plan.number, plan.round_id, plan.release_id, plan.cursor, plan.to_bytes(), _now()),
            )
            database.execute("DELETE FROM wanted WHERE method = ?", (plan.method,))

    def unfinished(self) -> RoundPlan | None:
        """Raises StorageError for a plan that this version cannot read, as all that give plans."""
        with self.transaction() as database:
            row = database.execute("SELECT plan FROM rounds WHERE state = 'training'").fetchone()
        return None if row is None else _read(row[0])

    def reads(self) -> int:
        """Number of the newest feedback that an unfinished round reads; 0 without one."""
        plan = self.unfinished()
        if plan is None:
            return 0
        warm = plan.grpo.warm if plan.grpo else None
        return max(plan.cursor, warm.cursor if warm else 0)

    def last(self) -> RoundPlan | None:
        """The newest round, whatever became of it."""
        with self.transaction() as database:
            row = database.execute(
                "SELECT plan FROM rounds ORDER BY number DESC LIMIT 1"
            ).fetchone()
        return None if row is None else _read(row[0])

    def finish(self, round_id: str, update_id: str) -> None:
        """The update is in the outbox; checkpoints are removed."""
        self._end(round_id, "finished", update_id)

    def abandon(self, round_id: str, reason: str) -> None:
        """It cannot be completed; its experience stays and goes into the next round."""
        self._end(round_id, "abandoned", reason)

    def give_up(self, round_id: str, reason: str) -> None:
        """It gained nothing; another one from its start may."""
        self._end(round_id, "given up", reason)

    def drop(self, round_id: str, when: str) -> None:
        """Nothing is wrong with it, but its update would be of no use any more. What it was to
        learn from is as new as before.
        """
        self._end(round_id, "given up", f"{_OBSOLETE} {when}")

    def end_unrewarded(self, round_id: str, reason: str) -> None:
        """Every answer scored zero; the next round from its start begins with a warm start."""
        self._end(round_id, "no reward", reason)

    def saturate(self, round_id: str, reason: str) -> None:
        """Nothing can be gained from its start; no update."""
        self._end(round_id, "nothing to gain", reason)

    def explored(self, release_id: str) -> bool:
        """Whether a round from this release sent an update or found nothing to gain, or an operator
        wanted none.
        """
        with self.transaction() as database:
            row = database.execute(
                "SELECT 1 FROM rounds WHERE start_release = ? AND state IN ('finished', "
                "'nothing to gain', 'cancelled') LIMIT 1",
                (release_id,),
            ).fetchone()
        return row is not None

    def sent(self, release_id: str) -> set[Method]:
        """Methods of the rounds from this release that sent an update."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT plan FROM rounds WHERE start_release = ? AND state = 'finished'",
                (release_id,),
            ).fetchall()
        return {_read(row[0]).method for row in rows}

    def cursors(self) -> dict[Method, int]:
        """The cursor of the last round of each method that was not dropped; 0 where there is none.

        A grpo round takes no feedback, and its plan has the cursor of the sft round before it.
        """
        with self.transaction() as database:
            rows = database.execute(
                "SELECT json_extract(CAST(plan AS TEXT), '$.feedback.method') AS method, cursor, "
                f"MAX(number) FROM rounds WHERE NOT ({_WAS_DROPPED}) GROUP BY method"
            ).fetchall()
        found = {method or "sft": cursor for method, cursor, _ in rows}
        return {method: found.get(method, 0) for method in RICHEST}

    def unrewarded(self, release_id: str) -> bool:
        """Whether a round from this release ended because every answer scored zero."""
        with self.transaction() as database:
            row = database.execute(
                "SELECT 1 FROM rounds WHERE start_release = ? AND state = 'no reward' LIMIT 1",
                (release_id,),
            ).fetchone()
        return row is not None

    def cancelled_cursor(self, method: Method) -> int:
        """The cursor of the newest cancelled round of this method of feedback; 0 without one."""
        with self.transaction() as database:
            cursor = database.execute(
                "SELECT MAX(cursor) FROM rounds WHERE state = 'cancelled' AND "
                "json_extract(CAST(plan AS TEXT), '$.feedback.method') = ?",
                (method,),
            ).fetchone()[0]
        return int(cursor or 0)

    def given_up(self, release_id: str) -> int:
        """How many grpo rounds from this release gained nothing."""
        with self.transaction() as database:
            count = database.execute(
                "SELECT count(*) FROM rounds WHERE start_release = ? AND state = 'given up' AND "
                f"NOT ({_WAS_DROPPED}) AND {_EXPLORED}",
                (release_id,),
            ).fetchone()[0]
        return int(count)

    def ends(self, newest: int | None = None) -> list[RoundEnd]:
        """How the rounds stand, newest first; `newest`: no more than so many of them."""
        with self.transaction() as database:
            rows = database.execute(
                "SELECT plan, state, result, changed_at FROM rounds ORDER BY number DESC LIMIT ?",
                (-1 if newest is None else newest,),
            ).fetchall()
        return [RoundEnd(_read(row[0]), *row[1:]) for row in rows]

    def outcomes(self) -> dict[str, int]:
        """How many rounds there are by state."""
        with self.transaction() as database:
            rows = database.execute("SELECT state, count(*) FROM rounds GROUP BY state").fetchall()
        return {str(state): int(number) for state, number in rows}

    def last_was_abandoned(self) -> bool:
        """Whether the newest round that ended by itself could not be completed."""
        with self.transaction() as database:
            row = database.execute(
                "SELECT state FROM rounds WHERE state IN ('finished', 'abandoned') ORDER BY "
                "number DESC LIMIT 1"
            ).fetchone()
        return row is not None and row[0] == "abandoned"

    def workspace(self, round_id: str) -> Path:
        """Directory of the round's checkpoints."""
        folder = self._path / "rounds" / round_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_workspaces(self) -> None:
        """Removes the checkpoints of every round but the unfinished one."""
        with self.transaction() as database:
            kept = database.execute("SELECT round_id FROM rounds WHERE state = 'training'")
            names = {row[0] for row in kept}
        for folder in (self._path / "rounds").glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def _end(self, round_id: str, state: str, result: str) -> None:
        with self.transaction() as database:
            database.execute(
                "UPDATE rounds SET state = ?, result = ?, changed_at = ? WHERE round_id = ? AND "
                "state = 'training'",
                (state, result, _now(), round_id),
            )
        self.clear_workspaces()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """On disk when the block ends; undone when it raises."""
        database = sqlite3.connect(self._path / "rounds.db", timeout=self._busy_timeout_s)
        try:
            database.execute("PRAGMA synchronous=FULL")
            with database:
                yield database
        finally:
            database.close()


def open_starts(data_dir: Path) -> set[str]:
    """Releases that an unfinished round starts from; their directories must not be collected."""
    if not (data_dir / "learning" / "rounds.db").is_file():
        return set()
    with RoundStore(data_dir / "learning").transaction() as database:
        rows = database.execute("SELECT start_release FROM rounds WHERE state = 'training'")
        return {str(row[0]) for row in rows}


def _read(plan: bytes) -> RoundPlan:
    """Raises StorageError for one that this version does not know."""
    try:
        return RoundPlan.model_validate_json(plan)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StorageError(
            f"A round in learning/rounds.db has a plan that this version cannot read: {place}: "
            f"{first['msg']}. A newer version planned it. Install that version again. Or stop the "
            "node and move learning/rounds.db away: then its rounds begin anew."
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
