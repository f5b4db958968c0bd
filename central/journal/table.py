"""The journal's table of events, in whatever database its URL names.

In: events, or a place in the sequence. Out: rows, and the events they were. Guarantee: SQLite is
opened in WAL mode with synchronous=FULL, so that a commit survives `kill -9` and a power cut; a row
that nobody could have written is JournalCorrupt.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from central.errors import StorageError
from central.journal.events import Event, EventKind, JournalCorrupt
from protos.manifest import canonical_json

METADATA = sa.MetaData()
EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column(
        "sequence",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=False,
    ),
    sa.Column("at", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("cohort", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("previous_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("seal", sa.Text, nullable=False, server_default=""),
)
PAGE = 1000
DISK_FULL = "53100"
"""Of PostgreSQL."""
UNUSABLE = (SQLAlchemyError, ImportError, UnicodeDecodeError)
"""What a database raises that cannot be used.

ImportError: its driver is not installed. UnicodeDecodeError: its file is so damaged that SQLite's
own message quotes garbage.
"""


def open_database(url: str, read_only: bool = False) -> sa.Engine:
    """Raises StorageError for a database in memory, one of UNUSABLE for one that cannot be used."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return sa.create_engine(
            parsed, pool_pre_ping=True
        )  # a database that was restarted costs no event
    if parsed.database in (None, "", ":memory:"):
        raise StorageError(
            "CENTRAL_JOURNAL__URL names a database in memory. Expected a file, which survives a "
            "restart."
        )
    if read_only:
        file = f"file:{quote(str(Path(str(parsed.database)).absolute()))}"
        return sa.create_engine(parsed.set(database=file, query={"mode": "ro", "uri": "true"}))
    engine = sa.create_engine(parsed)

    @sa.event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA busy_timeout=10000")
        cursor.close()

    return engine


def read_page(engine: sa.Engine, after: int, limit: int) -> list[Event]:
    """At most `limit` events above number `above`, in order.

    Raises StorageError and JournalCorrupt.
    """
    return [_event(row) for row in _rows(engine, after, limit)]


def stored_events(engine: sa.Engine) -> Iterator[Event]:
    """All of them, in order; raises the same errors."""
    # One by one, so that the first bad event is the one that is named.
    after = 0
    while page := _rows(engine, after, PAGE):
        yield from map(_event, page)
        after = page[-1].sequence


def row_of(event: Event) -> dict[str, Any]:
    """The event as it is inserted."""
    return {
        "sequence": event.sequence,
        "at": event.at,
        "kind": event.kind.value,
        "cohort": event.cohort,
        "subject": event.subject,
        "body": canonical_json(dict(event.body)).decode(),
        "previous_hash": event.previous_hash,
        "hash": event.hash,
        "seal": event.seal,
    }


def cause_of(error: BaseException) -> str:
    """What the database's driver said, in one line."""
    return (str(getattr(error, "orig", None) or error) or repr(error)).splitlines()[0]


def is_full(error: Exception) -> bool:
    """Whether the database had no room for what was written."""
    cause = getattr(error, "orig", None)
    if isinstance(cause, sqlite3.Error):
        return getattr(cause, "sqlite_errorname", "") == "SQLITE_FULL"
    return getattr(cause, "sqlstate", "") == DISK_FULL


def _rows(engine: sa.Engine, after: int, limit: int) -> Sequence[sa.Row[Any]]:
    query = (
        sa.select(EVENTS).where(EVENTS.c.sequence > after).order_by(EVENTS.c.sequence).limit(limit)
    )
    try:
        with engine.connect() as connection:
            return connection.execute(query).all()
    except UNUSABLE as error:
        raise StorageError(
            f"The journal cannot be read: {cause_of(error)}. Check CENTRAL_JOURNAL__URL and "
            "CENTRAL_DATA_DIR."
        ) from error


def _event(row: sa.Row[Any]) -> Event:
    sequence, at, kind, cohort, subject, text, previous_hash, digest, seal = tuple(
        row
    )  # 9 look-ups by name take longer
    try:
        body = json.loads(text)
        if not isinstance(body, dict):
            raise ValueError(f"its body is {text[:40]!r}, not an object")
        return Event(
            sequence, at, EventKind(kind), cohort, subject, body, previous_hash, digest, seal
        )
    except (TypeError, ValueError, RecursionError) as error:  # TypeError: a damaged file gives NULL
        raise JournalCorrupt(
            f"Journal event {sequence} of kind {kind!r} cannot be read: {error}."
        ) from error
