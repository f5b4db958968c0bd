"""What a cohort's nodes are offered, through a Flower Grid.

In: the loop's offers, and the train message of a strategy. Out: durable offers in the journal, and
the updates of a plan as Flower replies.

CohortGrid is what the loop needs of a Grid. It has two implementations: JournalGrid here, whose
nodes read the offers from central by themselves, and SimulationGrid (simulation.py), which asks
Flower's virtual nodes.

    offer_training    -> nodes train, now and later  -> update_admitted
    send_and_receive  -> the updates of one plan     -> one reply per update, by digest
    offer_evaluation  -> nodes judge a candidate     -> evaluation_reported

Guarantees: an offer is in the journal before any node hears of it, so a restart goes on with it. A
grid sees the nodes and plans of one cohort.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from central.cohort.errors import FederationError
from central.cohort.payload import plan_replies
from central.cohort.strategies.product_mean import COHORT, CONFIG
from central.journal import EventKind, Journal, NewEvent, State

T = TypeVar("T")

STOP_CHECK_S = 1.0
"""Longest time until `stop`, an age or a deadline is seen."""


class CohortGrid(Grid):  # type: ignore[misc]
    """One per cohort, used by one thread. `stop` ends every wait.

    `is_connected` says of a node id whether the node can hear central now. `went_on` is called
    whenever the loop has nothing to do but wait.
    """

    def __init__(
        self,
        cohort: str,
        journal: Journal,
        stop: threading.Event,
        is_connected: Callable[[str], bool] = lambda node_id: True,
        clock: Callable[[], str] | None = None,
        went_on: Callable[[], None] = lambda: None,
    ) -> None:
        self.is_connected = is_connected
        self.clock = clock or journal.clock
        self._cohort = cohort
        self._journal = journal
        self._stop = stop
        self._went_on = went_on

    # What the loop asks.

    @abstractmethod
    def offer_training(self, max_rank: int) -> None:
        """Offer the cohort's nodes to train updates of at most this rank."""

    @abstractmethod
    def offer_evaluation(self, body: dict[str, Any]) -> str:
        """Offer the nodes of the event's body to evaluate a candidate; returns the offer's id."""

    def wait(self, predicate: Callable[[State], T]) -> T | None:
        """`predicate`'s value once it has one (None and False are none); None when stopped."""
        while not self._stop.is_set():
            # The predicate runs after every append and each slice: deadlines and ages need no
            # polling of the disk.
            value = self._journal.wait(predicate, STOP_CHECK_S)
            if value is not None:
                return value
            self._went_on()
        return None

    # What Flower's strategies ask.

    def get_node_ids(self) -> Iterable[int]:
        """Flower's numbers for the cohort's nodes that are not revoked."""
        with self._journal.read() as state:
            return [flower_id(node_id) for node_id in state.members(self._cohort)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """The plans' ids. Raises KeyError for a message that names no plan."""
        return [str(message.content[CONFIG]["plan"]) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The updates of these plans. Raises FederationError for another cohort's plan."""
        replies: list[Message] = []
        for plan_id in message_ids:
            with self._journal.read() as state:
                planned = state.plans.get(plan_id)
            if planned is None or planned.plan.cohort != self._cohort:
                raise FederationError(
                    f"Plan {plan_id!r} is not one of cohort {self._cohort!r}; expected a plan in "
                    "its journal."
                )
            replies += plan_replies(planned.plan)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """`push_messages`, then `pull_messages`. Nothing is waited for: the updates are there."""
        return self.pull_messages(self.push_messages(messages))

    # Flower's Grid must have these too; nothing of central uses them.

    def set_run(self, run: Any) -> None:
        """Refused: central runs its ServerApp outside of a Flower run."""
        _refuse("run")

    @property
    def run(self) -> Any:
        """Refused, as `set_run` is."""
        _refuse("run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refused: Flower's Message is made by its constructor."""
        _refuse("create_message")


class JournalGrid(CohortGrid):
    """The grid of a running central: nodes fetch offers and send replies over gRPC."""

    def offer_training(self, max_rank: int) -> None:
        """Journal the offer unless it stands already: it is for the cohort, whoever joins later."""
        with self._journal.read() as state:
            standing = state.train_offers.get(self._cohort)
            if standing is None or standing.max_rank != max_rank:
                self._append(EventKind.TRAIN_OFFERED, {"max_rank": max_rank})

    def offer_evaluation(self, body: dict[str, Any]) -> str:
        return self._append(EventKind.EVALUATION_OFFERED, body)

    def _append(self, kind: EventKind, body: dict[str, Any]) -> str:
        offer_id = uuid.uuid4().hex
        self._journal.append(NewEvent(kind, self._cohort, offer_id, body))
        return offer_id


def flower_id(node_id: str) -> int:
    """Flower numbers its nodes: 63 bits of the SHA-256 of our id, never COHORT."""
    number = int.from_bytes(hashlib.sha256(node_id.encode()).digest()[:8], "big") >> 1
    return number or COHORT + 1


def _refuse(name: str) -> NoReturn:
    raise FederationError(
        f"Grid.{name} has no use at central: its ServerApp runs outside of Flower."
    )
