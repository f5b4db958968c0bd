"""A journal that is stored: read it, verify it, count it, import it, with no central running.

In: a database's URL, or events. Out: events whose chain is checked, and the state that they imply.
Errors: StorageError for a database that cannot be used, JournalCorrupt naming the first bad event.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import sqlalchemy as sa

from central.errors import StorageError
from central.journal.events import (
    FIRST_HASH,
    Event,
    JournalConflict,
    JournalCorrupt,
)
from central.journal.migrations import upgrade_schema
from central.journal.state import State
from central.journal.table import (
    EVENTS,
    METADATA,
    PAGE,
    UNUSABLE,
    cause_of,
    open_database,
    row_of,
    stored_events,
)


def verify_journal(
    url: str, seen: Callable[[Event, State], None] = lambda event, state: None
) -> State:
    """Re-read and replay an existing journal; returns the state that its events imply.

    `seen` is called after each event with the state so far. Writes nothing and needs no running
    central, but may run beside one. Raises StorageError when the journal cannot be read,
    JournalCorrupt naming the first bad event. Signatures and the journal's end are checked by
    central/history.py.
    """
    state = State()
    with uncollected():
        for event in read_journal(url):
            replay(state, event)
            seen(event, state)
    return state


def read_journal(url: str) -> Iterator[Event]:
    """Every event of an existing journal, its chain checked on the way.

    Raises the same errors as verify_journal.
    """
    try:
        engine = open_database(url, read_only=True)
    except UNUSABLE as error:
        raise StorageError(
            f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL."
        ) from error
    try:
        yield from chain_of(engine)
    finally:
        engine.dispose()


def import_journal(url: str, events: Iterable[Event]) -> None:
    """Write a whole chain into an empty database, in one transaction.

    Raises StorageError for a database that is not empty.
    """
    try:
        engine = open_database(url)
        try:
            upgrade_schema(engine, METADATA)
            with engine.begin() as connection:
                count = connection.execute(
                    sa.select(sa.func.count()).select_from(EVENTS)
                ).scalar_one()
                if count:
                    raise StorageError(
                        f"The journal has {count} events already. Expected an empty database."
                    )
                left = iter(events)
                while page := [row_of(event) for event in islice(left, PAGE)]:
                    connection.execute(sa.insert(EVENTS), page)
        finally:
            engine.dispose()
    except UNUSABLE as error:
        raise StorageError(
            f"The journal cannot be written: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and "
            "the data directory."
        ) from error


def count_events(url: str) -> int:
    """How many events a database has that may not be a journal yet.

    Makes nothing. Raises StorageError.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).is_file():
            return 0
        engine = open_database(url, read_only=True)
        try:
            if not sa.inspect(engine).has_table(EVENTS.name):
                return 0
            with engine.connect() as connection:
                return int(
                    connection.execute(sa.select(sa.func.count()).select_from(EVENTS)).scalar_one()
                )
        finally:
            engine.dispose()
    except UNUSABLE as error:
        raise StorageError(
            f"The journal cannot be opened: {cause_of(error)}. Check CENTRAL_JOURNAL__URL."
        ) from error


def checked_chain(events: Iterable[Event]) -> Iterator[Event]:
    """The same events; raises JournalCorrupt at the first that does not follow the one before."""
    previous_hash = FIRST_HASH
    for sequence, event in enumerate(events, 1):
        try:
            fits = (event.sequence, event.previous_hash, event.hash) == (
                sequence,
                previous_hash,
                event.expected_hash,
            )
        except (
            TypeError,
            ValueError,
        ):  # what was never written: NaN, half a character, a body that is a list
            fits = False
        if not fits:
            raise JournalCorrupt(
                f"Journal event {event.sequence} ({event.kind} of {event.subject}) does not fit "
                f"the chain: expected number {sequence} after hash {previous_hash[:8]}. Restore "
                "the journal from a backup."
            )
        previous_hash = event.hash
        yield event


def chain_of(engine: sa.Engine) -> Iterator[Event]:
    return checked_chain(stored_events(engine))


@contextmanager
def uncollected() -> Iterator[None]:
    """Run the block without Python's search for cyclic garbage.

    A replay makes none, and each search would walk all that the replay has made so far.
    """
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
