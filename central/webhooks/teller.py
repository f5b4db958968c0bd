"""Tells one address what happens, in order, until it takes it.

In: the journal, standing problems. Out: signed requests. Guarantees: an event that the journal
holds is told at least once, also over a restart and however long the address is away; of two tries
of one event the id is the same. Nothing here holds up central: a thread of its own reads the
journal's pages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from central.errors import CentralError, StorageError
from central.fleet.presence import Presence
from central.journal import Event, Journal
from central.webhooks.messages import Message, of_event, of_problem
from central.webhooks.place import Place, PlaceFile
from central.webhooks.sending import shown
from central.webhooks.standing import Standing, is_away, problems_now
from lorikeet.pauses import doubling

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""How often standing problems are looked for."""
BATCH_S = 0.2
"""Events come in groups; the journal is not read for each one."""
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 300.0
AHEAD = 500
"""Messages that are made before they are sent."""
SAVE_EVERY = 5000
"""Events that need no telling are counted on disk so rarely: a restart reads them again."""
MOST_PROBLEMS = 1000
"""Problem messages that wait; the oldest go first, because what they say is over by then."""


@dataclass(frozen=True)
class Source:
    """Where the news comes from. `failure`, `shortage`: as the operator service has them."""

    journal: Journal
    presence: Presence
    failure: Callable[[str], str]
    shortage: Callable[[], str]


class Teller:
    """Long-lived: `run` until `stop` is set. One per address."""

    def __init__(
        self,
        url: str,
        file: PlaceFile,
        source: Source,
        groups: frozenset[str],
        send: Callable[[Message], str | None],
    ) -> None:
        """Raises StorageError when the file of its place cannot be read."""
        self._name = shown(url)
        self._file = file
        self._from = source
        self._groups = groups
        self._send = send
        self._place = self._begin(file.read())
        self._standing = Standing(self._place.standing)
        self._read_to = self._place.sequence
        self._ahead: deque[tuple[Event, Message]] = deque()
        self._news = threading.Event()
        self.told = 0
        self.failed = 0

    @property
    def waiting(self) -> int:
        """Messages that were made and not taken yet."""
        return len(self._ahead) + len(self._place.waiting)

    def run(self, stop: threading.Event) -> None:
        """Tell until `stop`; what it raises is logged, and it goes on."""
        unsubscribe = self._from.journal.add_listener(lambda event: self._news.set())
        pauses = doubling(FIRST_PAUSE_S, LAST_PAUSE_S)
        next_look = time.monotonic()
        try:
            while not stop.is_set():
                self._news.clear()
                try:
                    if time.monotonic() >= next_look:
                        next_look = time.monotonic() + LOOK_S
                        self.look()
                    why = self.step()
                except Exception as error:  # a full disk must not end it for ever
                    why = str(error) if isinstance(error, CentralError) else type(error).__name__
                if why is None:
                    pauses = doubling(FIRST_PAUSE_S, LAST_PAUSE_S)
                    self._news.wait(max(0.0, next_look - time.monotonic()))
                    stop.wait(BATCH_S)
                    continue
                pause_s = next(pauses)
                self.failed += 1
                log.warning(
                    "webhook not told",
                    extra={"host": self._name, "why": why, "again_in_s": round(pause_s, 1)},
                )
                stop.wait(pause_s)
        finally:
            unsubscribe()

    def wake(self) -> None:
        """Look now: there is news, or it is to stop."""
        self._news.set()

    def step(self) -> str | None:
        """Tell all there is; why it stopped before the end, if it did. Raises StorageError."""
        while True:
            while self._place.waiting:
                message_id, body = self._place.waiting[0]
                if why := self._send(Message(message_id, body.encode())):
                    return why
                self.told += 1
                self._place.waiting.pop(0)
                self._file.write(self._place)
            if not self._ahead and not self._read():
                return None
            while self._ahead:
                event, message = self._ahead[0]
                if why := self._send(message):
                    return why
                self.told += 1
                self._ahead.popleft()
                self._keep(event)

    def _read(self) -> bool:
        """Make messages of the next events; False when there are none."""
        while not self._ahead:
            events = self._from.journal.events(self._read_to, AHEAD)
            if not events:
                return False
            with self._from.journal.read() as state:
                for event in events:
                    if (message := of_event(event, state, self._groups)) is not None:
                        self._ahead.append((event, message))
            self._read_to = events[-1].sequence
            if not self._ahead and self._read_to - self._place.sequence >= SAVE_EVERY:
                self._keep(events[-1])
        return True

    def _keep(self, event: Event) -> None:
        self._place.sequence, self._place.event_hash = event.sequence, event.hash
        self._file.write(self._place)

    def look(self) -> None:
        """Messages of problems that began or are over, on disk before they are sent."""
        if "problem" not in self._groups:
            return
        source = self._from
        try:
            shortage = source.shortage()
        except StorageError as error:
            shortage = str(error)
        with source.journal.read() as state:
            cohorts, nodes = state.cohorts(), list(state.nodes.values())
            now = problems_now(cohorts, nodes, source.presence, source.failure, shortage)
            changes = self._standing.look(now, lambda key: is_away(key, state, source.presence))
        if not changes:
            return
        at = source.journal.clock()
        made = [of_problem(key, at, began, dict(data)) for key, began, data in changes]
        waiting = [*self._place.waiting, *((one.message_id, one.body.decode()) for one in made)]
        if (lost := len(waiting) - MOST_PROBLEMS) > 0:
            log.warning("webhook problems dropped", extra={"host": self._name, "dropped": lost})
        self._place.waiting = waiting[-MOST_PROBLEMS:]
        self._place.standing = dict(self._standing.known)
        self._file.write(self._place)

    def _begin(self, place: Place | None) -> Place:
        """Where to go on: a new address hears what happens from now on."""
        journal = self._from.journal
        with journal.read() as state:
            end = Place(state.sequence, state.last_hash)
        if place is not None and place.sequence > 0:
            found = journal.events(place.sequence - 1, 1)
            if not found or found[0].hash != place.event_hash:
                log.warning(
                    "the journal is another one than the webhook was told of; it goes on at its "
                    "end",
                    extra={"host": self._name, "sequence": place.sequence},
                )
                end.standing, end.waiting = place.standing, place.waiting
                place = None
        if place is None:
            place = end
            self._file.write(place)
        return place
