"""The journal's database: what is imported, counted, sealed, and at what time a journal goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import central.journal.stored as stored
from central.errors import StorageError
from central.journal import Event, Journal, JournalCorrupt
from central.journal.head import Head
from central.journal.stored import (
    checked_chain,
    count_events,
    import_journal,
    read_journal,
)
from tests.unit.central import builders as make


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'journal.db'}"


@pytest.fixture
def events(url: str) -> Iterator[list[Event]]:
    """Of a cohort with a token and a node."""
    journal = Journal(url)
    make.start_cohort(journal)
    yield journal.events()
    journal.close()


@pytest.mark.parametrize("page", [1, 2, 3, 512])
def test_an_import_is_the_same_chain(
    events: list[Event], url: str, tmp_path: Path, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PAGE", page)
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert count_events(other) == 0
    assert not (tmp_path / "other.db").exists(), "counting makes nothing"
    import_journal(other, events)
    assert count_events(other) == 3
    assert list(read_journal(other)) == events == list(read_journal(url))
    with pytest.raises(StorageError, match=r"has 3 events already. Expected an empty database"):
        import_journal(other, events)
    assert count_events(other) == 3
    names = [fd.resolve() for fd in Path("/proc/self/fd").iterdir()]
    assert tmp_path / "other.db" not in names, "it was closed each time"


def test_a_database_that_is_no_journal_has_no_events(tmp_path: Path) -> None:
    (tmp_path / "empty.db").write_bytes(b"")
    assert count_events(f"sqlite:///{tmp_path / 'empty.db'}") == 0


def test_a_place_that_is_none_is_named(tmp_path: Path) -> None:
    absent, broken = f"sqlite:///{tmp_path}/absent/journal.db", tmp_path / "broken.db"
    broken.write_bytes(b"no database" * 1000)
    with pytest.raises(StorageError, match=r"The journal cannot be written.*CENTRAL_JOURNAL__URL"):
        import_journal(absent, [])
    for read in (count_events, lambda url: list(read_journal(url))):
        with pytest.raises(StorageError, match=r"cannot be opened|cannot be read"):
            read(f"sqlite:///{broken}")


@pytest.mark.parametrize(
    "change", [{"sequence": 7}, {"previous_hash": "1" * 64}, {"hash": "1" * 64}, {"body": [1]}]
)
def test_a_chain_is_read_up_to_its_first_wrong_event(
    events: list[Event], change: dict[str, object]
) -> None:
    wrong = replace(events[1], **change)
    read = checked_chain([events[0], wrong, events[2]])
    assert next(read) == events[0]
    text = f"expected number 2 after hash {events[0].hash[:8]}"
    with pytest.raises(JournalCorrupt, match=text):
        next(read)


class Seals:
    """Seals with the event's number, and keeps heads."""

    def __init__(self) -> None:
        self.kept: list[Head] = []

    def seal(self, sequence: int, digest: str) -> Head:
        return Head(sequence=sequence, hash=digest, seal=f"seal {sequence}")

    def keep(self, head: Head) -> None:
        self.kept.append(head)


def test_the_last_event_of_every_append_is_sealed_and_its_head_kept(url: str) -> None:
    seals = Seals()
    journal = Journal(url, seals=seals)
    genesis = make.start_cohort(journal)
    assert journal.append() == []
    journal.append(make.admitted(make.make_update(genesis)))
    events = journal.events()
    assert [event.seal for event in events] == ["", "", "seal 3", "seal 4"]
    assert seals.kept == [
        Head(sequence=event.sequence, hash=event.hash, seal=event.seal) for event in events[2:]
    ]
    journal.close()


def test_time_goes_on_from_the_last_event(url: str) -> None:
    ahead = Journal(url, clock=lambda: "2999-01-01T00:00:00.000000Z")
    genesis = make.start_cohort(ahead)
    ahead.close()
    journal = Journal(url)
    [event] = journal.append(make.admitted(make.make_update(genesis)))
    assert event.at >= "2999-01-01T00:00:00.000000Z"
    assert journal.now().year == 2999
    journal.close()
