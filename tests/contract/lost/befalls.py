"""What befalls a journal, what is said of it, and the central that it befalls."""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from central.blobs import DirectoryBlobs
from central.fleet.pki import Pki
from central.heads import FILE, NOTE, Heads
from central.journal import EventKind, Journal, NewEvent, read_journal
from central.journal.events import FIRST_HASH, chain
from central.journal.table import row_of
from central.rooms import open_rooms
from central.settings import CentralSettings
from tests.unit.central import builders as make

EVENTS, OLD = 10, 8
"""Cohort, token, four nodes, four updates; and so many when the old copy was made."""


@dataclass(frozen=True)
class Prepared:
    """A central with four acknowledged updates; `old` is its database after the first two."""

    settings: CentralSettings
    old: Path


def start(original: Prepared, data: Path) -> int:
    """Open a central as `serve` does; returns its number of events."""
    settings = original.settings.model_copy(update={"data_dir": data})
    with ExitStack() as stack, open_rooms(settings, stack).journal.read() as state:
        return state.sequence


def events_of(data: Path) -> list[NewEvent]:
    stored = read_journal(f"sqlite:///{data}/journal.db")
    return [NewEvent(event.kind, event.cohort, event.subject, event.body) for event in stored]


def remove_database(data: Path) -> None:
    for file in data.glob("journal.db*"):
        file.unlink()


def rewrite(data: Path, events: list[NewEvent]) -> None:
    """What somebody who may write the database does: any events, with hashes that fit."""
    rows, previous = [], FIRST_HASH
    for number, new in enumerate(events, 1):
        event = chain(new, number, make.AT, previous)
        rows.append(row_of(event))
        previous = event.hash
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events")
        columns = list(rows[0])
        marks = ", ".join("?" for _ in columns)
        database.executemany(
            f"insert into events ({', '.join(columns)}) values ({marks})",
            [tuple(row.values()) for row in rows],
        )


# What befalls a journal, and what is said of it.


def deleted(data: Path, original: Prepared) -> str:
    remove_database(data)
    return (
        rf"The journal has no events, but central recorded event {EVENTS} "
        rf".*Events 1 to {EVENTS} are missing"
    )


def emptied(data: Path, original: Prepared) -> str:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events")
    return rf"The journal has no events, but .*Events 1 to {EVENTS} are missing"


def truncated_to_nothing(data: Path, original: Prepared) -> str:
    remove_database(data)
    (data / "journal.db").touch()
    return rf"The journal has no events, but .*Events 1 to {EVENTS} are missing"


def last_event_dropped(data: Path, original: Prepared) -> str:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute("delete from events where sequence = (select max(sequence) from events)")
    return rf"The journal ends with event {EVENTS - 1}, but .*Event {EVENTS} is missing"


def older_file(data: Path, original: Prepared) -> str:
    remove_database(data)
    shutil.copy(original.old, data / "journal.db")
    return rf"The journal ends with event {OLD}, but .*Events {OLD + 1} to {EVENTS} are missing"


def older_file_and_head(data: Path, original: Prepared) -> str:
    """Database and head file together: the copy beside the blobs knows."""
    (data / FILE).unlink()
    return older_file(data, original)


def older_file_that_went_on(data: Path, original: Prepared) -> str:
    remove_database(data)
    shutil.copy(original.old, data / "journal.db")
    elsewhere = Heads(
        data / "nowhere", DirectoryBlobs(data / "nowhere"), Pki.load_or_create(data, []).release_key
    )
    (data / "nowhere").mkdir()
    journal = Journal(f"sqlite:///{data}/journal.db", seals=elsewhere)
    for number in range(5):
        journal.append(make.token_created("shared", f"later-{number}"))
    journal.close()
    return rf"Event {EVENTS} of the journal has hash \w+; central recorded it as"


def more_uses(data: Path, original: Prepared) -> str:
    events = events_of(data)
    (token,) = (
        number for number, event in enumerate(events) if event.kind is EventKind.TOKEN_CREATED
    )
    events[token] = NewEvent(
        events[token].kind,
        events[token].cohort,
        events[token].subject,
        {**events[token].body, "uses": 99},
    )
    rewrite(data, events)
    return rf"Event {EVENTS} of the journal has hash"


def update_removed(data: Path, original: Prepared) -> str:
    *others, _, last = events_of(data)
    rewrite(data, [*others, last])
    return rf"The journal ends with event {EVENTS - 1}, but"


def rewritten_and_longer(data: Path, original: Prepared) -> str:
    """Both heads are gone too: the missing seal shows it."""
    rewrite(data, [*events_of(data), make.token_created("shared", "own")])
    (data / FILE).unlink()
    (data / "blobs" / NOTE).unlink()
    return "no head of it is kept"


def both_heads_lost(data: Path, original: Prepared) -> str:
    (data / FILE).unlink()
    (data / "blobs" / NOTE).unlink()
    return rf"The journal ends with event {EVENTS}, and no head of it is kept"


def everything_but_blobs_lost(data: Path, original: Prepared) -> str:
    both_heads_lost(data, original)
    remove_database(data)
    return "has no events, though the blob store has blobs"


BEFALLS = [
    deleted, emptied, truncated_to_nothing, last_event_dropped,
    older_file, older_file_and_head, older_file_that_went_on, more_uses,
    update_removed, rewritten_and_longer, both_heads_lost, everything_but_blobs_lost,
]  # fmt: skip


def kept_files(data: Path) -> dict[Path, bytes]:
    """All but the database, the remembered digests of the base, and the ballast of a full disk."""
    left_out = ("journal.db", "base-digests.json", "room.ballast")
    files = (path for path in data.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith(left_out)}


def assert_matches(expected: str, text: str) -> None:
    assert re.search(expected, text, re.DOTALL), text


def head_at(data: Path, sequence: int) -> bytes:
    digest = next(
        event.hash
        for event in read_journal(f"sqlite:///{data}/journal.db")
        if event.sequence == sequence
    )
    heads = Heads(data, DirectoryBlobs(data / "blobs"), Pki.load_or_create(data, []).release_key)
    return heads.seal(sequence, digest).to_bytes()
