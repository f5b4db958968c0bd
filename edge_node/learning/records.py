"""The node's rounds: what each one is, durable before it trains, and how it ended.

In: a RoundPlan. Out: the unfinished plan after a crash, the last cursor, a working directory per round. SQLite (WAL,
synchronous=FULL). A plan fixes everything that a round's update depends on, so a resumed round makes the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from edge_node.errors import StorageError
from edge_node.settings import LearningSettings
from protos.manifest import Document, ReleaseManifest

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


class RoundImpossible(LookupError):
    """A round that can never be completed. Its words are ours and quote nothing that a customer
    wrote.
    """

    def __init__(self, text: str, next_step: str) -> None:
        super().__init__(text)
        self.next_step = next_step


class RoundPlan(Document):
    """One round: its start, its data and its hyper-parameters."""

    schema_version: Literal[1] = 1
    number: int
    round_id: str
    release_id: str
    label: str
    payload_digest: str
    release_rank: int
    """Rank of the release's prefix on disk that the round starts from; the release's own when whole."""
    cursor: int
    """Experiences up to this feedback."""
    seed: int
    rank: int
    alpha: float
    steps: int
    batch_own: int
    batch_hard: int
    batch_anchor: int
    anchor_pool: int
    anchor_seed: int
    learning_rate: float
    max_examples: int
    checkpoint_steps: int
    created_at: str

    def age_s(self) -> float:
        """Seconds since the round was planned, by the wall clock; never negative."""
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.created_at)).total_seconds())


def plan_round(
    settings: LearningSettings,
    *,
    number: int,
    node_id: str,
    release: ReleaseManifest,
    prefix_rank: int | None = None,
    cursor: int,
    max_rank: int | None,
) -> RoundPlan:
    """The plan of the node's round `number` from `release`; the seed depends on setting, node and number only.

    `max_rank` is what central's offer says.
    """
    seed = int.from_bytes(hashlib.sha256(f"{settings.seed}/{node_id}/{number}".encode()).digest()[:4], "big")
    return RoundPlan(
        number=number,
        round_id=f"r{number:06d}-{release.label}",
        release_id=release.digest,
        label=release.label,
        payload_digest=release.payload.digest_sha256,
        release_rank=release.rank if prefix_rank is None else prefix_rank,
        cursor=cursor,
        seed=seed,
        rank=min(settings.rank, max_rank or settings.rank),
        alpha=settings.alpha,
        steps=settings.steps,
        batch_own=settings.batch_own,
        batch_hard=min(settings.batch_hard, settings.batch_own),
        batch_anchor=settings.batch_anchor,
        anchor_pool=settings.anchor_pool,
        anchor_seed=settings.seed,
        learning_rate=settings.learning_rate * settings.round_decay**release.version,
        max_examples=settings.max_examples,
        checkpoint_steps=settings.checkpoint_steps,
        created_at=_now(),
    )


class RoundStore:
    """Owner of `learning/` in the data directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with self._transaction() as database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"Cannot open the round records in {path}: {error}. EDGE_DATA_DIR must be writable, with free space."
            ) from error

    def begin(self, plan: RoundPlan) -> None:
        """On disk when this returns. Raises ValueError when another round is unfinished."""
        with self._transaction() as database:
            database.execute("BEGIN IMMEDIATE")
            other = database.execute("SELECT round_id FROM rounds WHERE state = 'training'").fetchone()
            if other is not None:
                raise ValueError(f"Round {other[0]} is unfinished; round {plan.round_id} has to wait for it.")
            database.execute(
                "INSERT INTO rounds (number, round_id, start_release, cursor, plan, state, changed_at)"
                " VALUES (?, ?, ?, ?, ?, 'training', ?)",
                (plan.number, plan.round_id, plan.release_id, plan.cursor, plan.to_bytes(), _now()),
            )

    def unfinished(self) -> RoundPlan | None:
        with self._transaction() as database:
            row = database.execute("SELECT plan FROM rounds WHERE state = 'training'").fetchone()
        return None if row is None else RoundPlan.from_bytes(row[0])

    def last(self) -> RoundPlan | None:
        """The newest round, whatever became of it."""
        with self._transaction() as database:
            row = database.execute("SELECT plan FROM rounds ORDER BY number DESC LIMIT 1").fetchone()
        return None if row is None else RoundPlan.from_bytes(row[0])

    def finish(self, round_id: str, update_id: str) -> None:
        """The update is in the outbox; checkpoints are removed."""
        self._end(round_id, "finished", update_id)

    def abandon(self, round_id: str, reason: str) -> None:
        """It cannot be completed; its experience stays and goes into the next round."""
        self._end(round_id, "abandoned", reason)

    def give_up(self, round_id: str, reason: str) -> None:
        """Nothing is wrong with it, but its update would be of no use any more."""
        self._end(round_id, "given up", reason)

    def last_was_abandoned(self) -> bool:
        """Whether the newest round that ended by itself could not be completed."""
        with self._transaction() as database:
            row = database.execute(
                "SELECT state FROM rounds WHERE state IN ('finished', 'abandoned') ORDER BY number DESC LIMIT 1"
            ).fetchone()
        return row is not None and row[0] == "abandoned"

    def workspace(self, round_id: str) -> Path:
        """Directory of the round's checkpoints."""
        folder = self._path / "rounds" / round_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _end(self, round_id: str, state: str, result: str) -> None:
        with self._transaction() as database:
            database.execute(
                "UPDATE rounds SET state = ?, result = ?, changed_at = ? WHERE round_id = ? AND state = 'training'",
                (state, result, _now(), round_id),
            )
        shutil.rmtree(self._path / "rounds" / round_id, ignore_errors=True)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self._path / "rounds.db", timeout=30)
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
    plan = RoundStore(data_dir / "learning").unfinished()
    return set() if plan is None else {plan.release_id}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
