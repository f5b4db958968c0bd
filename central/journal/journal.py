"""The journal itself: append, read, wait, verify.

In: new events. Out: numbered events chained by hash, and the state they imply. Guarantees: `append` is one durable
transaction, all or nothing, and has checked every event against the state; what it returned survives `kill -9`.
Thread-safe; every call blocks on disk, so call it off the event loop. How events are stored: table.py.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from central import faults
from central.clock import Clock
from central.errors import StorageError, StorageFull
from central.journal.events import (
    FIRST_HASH,
    Event,
    JournalConflict,
    JournalCorrupt,
    NewEvent,
    chain,
)
from central.journal.head import Head, Seals
from central.journal.migrations import upgrade_schema
from central.journal.state import State
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
    stored_events,
)

T = TypeVar("T")
log = logging.getLogger(__name__)


class Journal:
    """Append-only record with its state; one writer per database."""

    def __init__(self, url: str, clock: Callable[[], str] | None = None, seals: Seals | None = None) -> None:
        """Open or create the journal at SQLAlchemy `url` (not in memory), replay it and verify its
        chain.

        `seals` signs the last event of every append, and keeps the journal's head elsewhere before
        `append` returns. Without it the events have no signature.

        Raises StorageError when it cannot be opened, JournalCorrupt when the chain is broken.
        """
        own_clock = Clock()
        self.clock: Callable[[], str] = clock or own_clock
        """The present time, RFC 3339 UTC; ages and deadlines are counted with it (central/clock.py)."""
        self._seals = seals
        self._changed = threading.Condition(threading.RLock())
        self._listeners: list[Callable[[Event], None]] = []
        self._state = State()
        self._closed = False
        self._doubtful: list[list[Event]] = []
        try:
            self._engine = open_database(url)
            upgrade_schema(self._engine, METADATA)
            with _uncollected():
                last: Event | None = None
                for last in _chain(self._engine):
                    replay(self._state, last)
        except UNUSABLE as error:
            raise StorageError(
                f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and the data directory."
            ) from error
        self._state.mark()
        if last is not None:
            own_clock.go_on_from(last.at)

    def now(self) -> datetime:
        """What `clock` says."""
        return datetime.fromisoformat(self.clock())

    def append(self, *events: NewEvent) -> list[Event]:
        """Record `events` in one durable transaction.

        Raises JournalConflict when one of them does not fit the state, StorageError when the disk refuses or the journal
        is closed; then nothing was recorded. Only a database that vanishes during the commit may have recorded them all:
        the next append finds out, takes them over, and raises JournalConflict because its caller did not know of them.
        """
        with self._changed:
            if self._closed:  # a merge that outlives central's stop must not write beside the next central
                raise StorageError("The journal is closed because central stops. The next start goes on from here.")
            self._take_over()
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
        """The state, unchanging inside the block; the lock is re-entrant, so an append inside follows from what was read."""
        with self._changed:
            yield self._state

    def wait(self, predicate: Callable[[State], T | None], timeout_s: float | None = None) -> T | None:
        """Block this thread until `predicate(state)` is neither None nor False; None after `timeout_s`.

        The predicate runs under the lock: after each append, and after `wake`.
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
        """Make every waiting thread check its predicate again (for example because it must stop)."""
        with self._changed:
            self._changed.notify_all()

    def add_listener(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` for every event after its commit, in order, in the appending thread, under the lock.

        It must neither block nor raise. Returns the function that ends it.
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
        """Re-read the whole chain; returns the number of events, raises JournalCorrupt naming the first bad one."""
        return sum(1 for _ in _chain(self._engine))

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
        """What is recorded stays: its head is kept, and everybody hears of it."""
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

    def _take_over(self) -> None:
        """Find out whether events whose commit failed are in the database all the same; raises JournalConflict when they are."""
        if not self._doubtful:
            return
        found = self.events(self._state.sequence, max(map(len, self._doubtful)) + 1)
        hashes = [event.hash for event in found]
        if hashes not in ([event.hash for event in events] for events in self._doubtful):
            return  # nothing, or another central's: then the next commit is refused
        self._doubtful.clear()
        for event in found:
            self._state.apply(event)
        self._tell(found)
        raise JournalConflict(
            f"The database vanished while event {found[0].sequence} ({found[0].kind}) was recorded, and has it all the same."
        )

    def _store(self, recorded: list[Event]) -> None:
        if not recorded:
            return
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(EVENTS), [row_of(event) for event in recorded])
        except IntegrityError as error:
            raise StorageError(
                f"Event {recorded[0].sequence} is in the journal already: another central writes to it. "
                "Stop one of the two and start the other again."
            ) from error
        except SQLAlchemyError as error:
            self._doubtful.append(recorded)
            if is_full(error):
                raise StorageFull(
                    f"The journal cannot be written: {cause_of(error)}. Free space on its disk; `central retention --apply` lists "
                    "and deletes what nothing needs."
                ) from error
            raise StorageError(
                f"The journal cannot be written: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and the disk of its database."
            ) from error
        self._doubtful.clear()


def verify_journal(url: str, seen: Callable[[Event, State], None] = lambda event, state: None) -> State:
    """Re-read the whole chain of an existing journal and replay it; returns the state that its
    events imply.

    `seen` is called after each event with the state so far. Writes nothing and needs no running
    central, but may run beside one. Raises StorageError when the journal cannot be read,
    JournalCorrupt naming the first bad event. Signatures and the journal's end are checked by
    central/history.py.
    """
    state = State()
    with _uncollected():
        for event in read_journal(url):
            replay(state, event)
            seen(event, state)
    return state


def read_journal(url: str) -> Iterator[Event]:
    """Every event of an existing journal, its chain checked on the way; the same errors as verify_journal."""
    try:
        engine = open_database(url, read_only=True)
    except UNUSABLE as error:
        raise StorageError(f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL.") from error
    try:
        yield from _chain(engine)
    finally:
        engine.dispose()


def import_journal(url: str, events: Iterable[Event]) -> None:
    """Write a whole chain into an empty database, in one transaction; raises StorageError for one that is not empty."""
    try:
        engine = open_database(url)
        try:
            upgrade_schema(engine, METADATA)
            with engine.begin() as connection:
                count = connection.execute(sa.select(sa.func.count()).select_from(EVENTS)).scalar_one()
                if count:
                    raise StorageError(f"The journal has {count} events already. Expected an empty database.")
                left = iter(events)
                while page := [row_of(event) for event in islice(left, PAGE)]:
                    connection.execute(sa.insert(EVENTS), page)
        finally:
            engine.dispose()
    except UNUSABLE as error:
        raise StorageError(
            f"The journal cannot be written: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and the data directory."
        ) from error


def count_events(url: str) -> int:
    """How many events a database has that may not be a journal yet; makes nothing. Raises StorageError."""
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
            return 0
        engine = open_database(url, read_only=True)
        try:
            if not sa.inspect(engine).has_table(EVENTS.name):
                return 0
            with engine.connect() as connection:
                return int(connection.execute(sa.select(sa.func.count()).select_from(EVENTS)).scalar_one())
        finally:
            engine.dispose()
    except UNUSABLE as error:
        raise StorageError(f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL.") from error


def checked_chain(events: Iterable[Event]) -> Iterator[Event]:
    """The same events; raises JournalCorrupt at the first that does not follow from the one before."""
    previous_hash = FIRST_HASH
    for sequence, event in enumerate(events, 1):
        try:
            fits = (event.sequence, event.previous_hash, event.hash) == (sequence, previous_hash, event.expected_hash)
        except (TypeError, ValueError):  # what was never written: NaN, half a character, a body that is a list
            fits = False
        if not fits:
            raise JournalCorrupt(
                f"Journal event {event.sequence} ({event.kind} of {event.subject}) does not fit the chain: "
                f"expected number {sequence} after hash {previous_hash[:8]}. Restore the journal from a backup."
            )
        previous_hash = event.hash
        yield event


def _chain(engine: sa.Engine) -> Iterator[Event]:
    return checked_chain(stored_events(engine))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for cyclic garbage: a replay makes none, and each search would walk all that it has made so far."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def replay(state: State, event: Event) -> None:
    try:
        state.apply(event)
        state.mark()
    except (JournalConflict, KeyError, ValueError) as error:
        raise JournalCorrupt(
            f"Journal event {event.sequence} ({event.kind}) cannot be replayed: {error}. "
            "It was written by other software, or altered; restore the journal from a backup."
        ) from error


def _reach(recorded: list[Event], step: str) -> None:
    for event in recorded:
        faults.reach(f"journal.{event.kind}.{step}")
