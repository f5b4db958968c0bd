"""The journal itself: append, read, wait, verify.

In: new events. Out: numbered events chained by hash, and the state they imply. Guarantees: `append`
is one durable transaction, all or nothing, and has checked every event against the state; what it
returned survives `kill -9`. Thread-safe; every call blocks on disk, so call it off the event loop.
How events are stored: table.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import NoReturn, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from central import faults
from central.errors import StorageError, StorageFull
from central.journal.events import (
    Event,
    EventKind,
    NewEvent,
    chain,
)
from central.journal.head import Head, Seals
from central.journal.migrations import upgrade_schema
from central.journal.state import State
from central.journal.stored import chain_of, replay, uncollected
from central.journal.table import (
    EVENTS,
    METADATA,
    PAGE,
    UNUSABLE,
    cause_of,
    is_full,
    open_database,
    read_page,
    row_of,
)
from lorikeet.clock import Clock

T = TypeVar("T")
log = logging.getLogger(__name__)
faults.POINTS.update(
    f"journal.{kind}.{step}" for kind in EventKind for step in ("applied", "stored")
)


class Journal:
    """Append-only record with its state; one writer per database."""

    def __init__(
        self, url: str, clock: Callable[[], str] | None = None, seals: Seals | None = None
    ) -> None:
        """Open or create the journal at SQLAlchemy `url`, replay it and verify its chain.

        The database must not be in memory. `seals` signs the last event of every append, and keeps
        the journal's head elsewhere before `append` returns. Without it the events have no
        signature.

        Raises StorageError when it cannot be opened, JournalCorrupt when the chain is broken.
        """
        own_clock = Clock()
        self.clock: Callable[[], str] = clock or own_clock
        """The present time, RFC 3339 UTC, for ages and deadlines (lorikeet/clock.py)."""
        self._seals = seals
        self._changed = threading.Condition(threading.RLock())
        self._listeners: list[Callable[[Event], None]] = []
        self._state = State()
        self._closed = False
        try:
            self._engine = open_database(url)
            upgrade_schema(self._engine, METADATA)
            with uncollected():
                last: Event | None = None
                for last in chain_of(self._engine):
                    replay(self._state, last)
        except UNUSABLE as error:
            raise StorageError(
                f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and "
                "the data directory."
            ) from error
        self._state.mark()
        if last is not None:
            own_clock.go_on_from(last.at)

    def now(self) -> datetime:
        """The present time, as `clock` gives it."""
        return datetime.fromisoformat(self.clock())

    def append(self, *events: NewEvent) -> list[Event]:
        """Record `events` in one durable transaction.

        Raises JournalConflict when one of them does not fit the state, StorageError when the disk
        refuses or the journal is closed; then nothing was recorded. When the commit itself fails,
        nobody knows whether the events are recorded: the process ends, and the next start reads it
        from the database.
        """
        with self._changed:
            if (
                self._closed
            ):  # a merge that outlives central's stop must not write beside the next central
                raise StorageError(
                    "The journal is closed because central stops. The next start goes on from here."
                )
            self._state.mark()
            try:
                recorded = [self._apply(new) for new in events]
                _reach(recorded, "applied")
                recorded = self._sealed(recorded)
                self._store(recorded)
                _reach(recorded, "stored")
            except BaseException:
                self._state.rollback()
                raise
            self._tell(recorded)
            return recorded

    @contextmanager
    def read(self) -> Iterator[State]:
        """The state, unchanging inside the block.

        The lock is re-entrant, so an append inside the block follows from what was read.
        """
        with self._changed:
            yield self._state

    def wait(
        self, predicate: Callable[[State], T | None], timeout_s: float | None = None
    ) -> T | None:
        """Block until `predicate(state)` holds; returns its value, or None after `timeout_s`.

        It holds when it is neither None nor False. The predicate runs under the lock: after each
        append, and after `wake`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                value = predicate(self._state)
                if value is not None and value is not False:
                    return value
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)

    def wake(self) -> None:
        """Make every waiting thread check its predicate again, for example because it must stop."""
        with self._changed:
            self._changed.notify_all()

    def add_listener(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` for every event after its commit, in order, under the lock.

        It runs in the appending thread and must neither block nor raise. Returns the function that
        ends it.
        """
        with self._changed:
            self._listeners.append(callback)

        def unsubscribe() -> None:
            with self._changed:
                if callback in self._listeners:
                    self._listeners.remove(callback)

        return unsubscribe

    def events(self, after: int = 0, limit: int = PAGE) -> list[Event]:
        """At most `limit` events with a sequence above `after`, in order."""
        return read_page(self._engine, after, limit)

    def verify(self) -> int:
        """Re-read the whole chain; returns the number of events.

        Raises JournalCorrupt naming the first bad event.
        """
        return sum(1 for _ in chain_of(self._engine))

    def close(self) -> None:
        """Close the database; idempotent. Nothing can be appended afterwards."""
        with self._changed:
            self._closed = True
        self._engine.dispose()

    def _apply(self, new: NewEvent) -> Event:
        event = chain(new, self._state.sequence + 1, self.clock(), self._state.last_hash)
        self._state.apply(event)
        return event

    def _sealed(self, recorded: list[Event]) -> list[Event]:
        if self._seals is None or not recorded:
            return recorded
        *others, last = recorded
        return [*others, replace(last, seal=self._seals.seal(last.sequence, last.hash).seal)]

    def _tell(self, recorded: list[Event]) -> None:
        """Keep the head of what was recorded, and tell everybody; what is recorded stays."""
        self._state.mark()
        if self._seals is not None and recorded:
            last = recorded[-1]
            self._seals.keep(Head(sequence=last.sequence, hash=last.hash, seal=last.seal))
        for event in recorded:
            log.info(
                "event recorded",
                extra={
                    "sequence": event.sequence,
                    "kind": event.kind,
                    "cohort": event.cohort,
                    "subject": event.subject,
                },
            )
            for listener in tuple(self._listeners):
                listener(event)
        self._changed.notify_all()

    def _store(self, recorded: list[Event]) -> None:
        if not recorded:
            return
        committing = False
        try:
            with self._engine.connect() as connection:
                connection.execute(sa.insert(EVENTS), [row_of(event) for event in recorded])
                committing = True
                connection.commit()
        except IntegrityError as error:
            raise StorageError(
                f"Event {recorded[0].sequence} is in the journal already: another central writes "
                "to it. Stop one of the two and start the other again."
            ) from error
        except SQLAlchemyError as error:
            if is_full(error):
                raise StorageFull(
                    f"The journal cannot be written: {cause_of(error)}. Free space on its disk; "
                    "`central retention --apply` lists and deletes what nothing needs."
                ) from error
            if committing:
                _end_in_doubt(recorded[0], error)
            raise StorageError(
                f"The journal cannot be written: {cause_of(error)}. Check CENTRAL_JOURNAL__URL "
                "and the disk of its database."
            ) from error
        except BaseException as error:  # of the driver's depths: no memory, a reset connection
            if committing:
                _end_in_doubt(recorded[0], error)
            raise


def _end_in_doubt(first: Event, error: BaseException) -> NoReturn:
    """End the process as a kill would: no thread acknowledges or undoes what may be recorded."""
    log.critical(
        "central ends: the database failed during a commit, so that event %d (%s) is recorded or "
        "is not; the next start reads which. Check the database, then start central again",
        first.sequence,
        first.kind,
        extra={"detail": cause_of(error)},
    )
    os._exit(StorageError.exit_code)


def _reach(recorded: list[Event], step: str) -> None:
    for event in recorded:
        faults.reach(f"journal.{event.kind}.{step}")
