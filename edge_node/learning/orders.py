"""What an operator orders of the rounds: a round now, or the end of the one that runs.

In: `edge-node rounds run | cancel`, from a process beside the learner. Out: rows of rounds.db, that
the learner reads between its steps. Guarantees: an order is on disk when its method returns. A
cancelled round never goes on, whatever is killed, and its update is never handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from edge_node.errors import EdgeError
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policy import Method
from edge_node.learning.records import RoundStore

BY_OPERATOR = "by an operator"


class OrderRefused(EdgeError, ValueError):
    """An operator's order cannot be followed; nothing has changed."""


class RoundCancelled(Exception):
    """An operator ended the round; its row says so already."""


@dataclass(frozen=True)
class Wish:
    """A round that an operator asked for and that has not begun. asked_at: ISO 8601, UTC."""

    method: Method
    asked_at: str


class Orders:
    """Orders of one RoundStore; any process of the node may make its own."""

    def __init__(self, rounds: RoundStore) -> None:
        self._rounds = rounds

    def want(self, method: Method) -> None:
        """Ask for a round; takes the place of an earlier wish.

        Raises OrderRefused while a round is unfinished.
        """
        with self._rounds.transaction() as database:
            database.execute("BEGIN IMMEDIATE")
            running = database.execute(
                "SELECT round_id FROM rounds WHERE state = 'training'"
            ).fetchone()
            if running is not None:
                raise OrderRefused(
                    f"Round {running[0]} runs; expected none, because a node runs one at a time. "
                    "Wait for its end, or end it: `edge-node rounds cancel`."
                )
            database.execute(
                "INSERT OR REPLACE INTO wanted (id, method, asked_at) VALUES (1, ?, ?)",
                (method, _now()),
            )

    def wish(self) -> Wish | None:
        """The round that was asked for, until it begins."""
        with self._rounds.transaction() as database:
            row = database.execute("SELECT method, asked_at FROM wanted").fetchone()
        return None if row is None else Wish(*row)

    def withdraw(self) -> bool:
        """Take the wish back; whether there was one."""
        with self._rounds.transaction() as database:
            return database.execute("DELETE FROM wanted").rowcount > 0

    def cancel(self, plan: RoundPlan, is_handed_over: Callable[[str], bool]) -> None:
        """End the unfinished round `plan` without an update.

        Args:
            is_handed_over: whether the outbox has the update of the round with that id.

        Raises:
            OrderRefused: the round has ended, or its update is in the outbox.
        """
        with self._rounds.transaction() as database:
            database.execute("BEGIN IMMEDIATE")  # nobody is inside `handing_over` now
            if is_handed_over(plan.round_id):
                raise OrderRefused(
                    f"Round {plan.round_id} has trained, and its update is in the outbox; "
                    "expected one that still trains. See `edge-node outbox list`; one that is held "
                    "can be rejected there."
                )
            ended = database.execute(
                "UPDATE rounds SET state = 'cancelled', result = ?, changed_at = ? WHERE round_id "
                "= ? AND state = 'training'",
                (BY_OPERATOR, _now(), plan.round_id),
            ).rowcount
        if not ended:
            raise OrderRefused(
                f"Round {plan.round_id} has ended meanwhile. See `edge-node rounds list`."
            )

    def expect_wanted(self, round_id: str) -> None:
        """Raises RoundCancelled when an operator ended the round."""
        with self._rounds.transaction() as database:
            _expect_training(database, round_id)

    @contextmanager
    def handing_over(self, round_id: str) -> Iterator[None]:
        """Inside the block nobody cancels the round; raises RoundCancelled when somebody has."""
        with self._rounds.transaction() as database:
            database.execute("BEGIN IMMEDIATE")
            _expect_training(database, round_id)
            yield


def _expect_training(database: Any, round_id: str) -> None:
    row = database.execute("SELECT state FROM rounds WHERE round_id = ?", (round_id,)).fetchone()
    if row is not None and row[0] == "cancelled":
        raise RoundCancelled(round_id)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
