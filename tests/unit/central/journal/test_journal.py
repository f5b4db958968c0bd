"""The journal: one transaction, one chain, one state."""

from __future__ import annotations

import gc
import sqlite3
import threading
from pathlib import Path

import pytest

import central.journal.journal as journal_module
from central.errors import StorageError
from central.journal import (
    Event,
    EventKind,
    Journal,
    JournalConflict,
    JournalCorrupt,
    NewEvent,
    State,
    stored,
    verify_journal,
)
from tests.unit.central import builders as make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(f"sqlite:///{path}")


def test_append_chains_and_a_reopened_journal_has_the_same_state(
    journal: Journal, path: Path
) -> None:
    genesis = make.start_cohort(journal)
    first, second = journal.events()[:2]
    assert (first.sequence, first.previous_hash) == (1, "0" * 64)
    assert second.previous_hash == first.hash == first.expected_hash
    journal.close()
    again = Journal(f"sqlite:///{path}")
    with again.read() as state:
        assert state.cohorts() == ["shared"]
        assert state.channels[("shared", "stable")] == genesis.digest
        assert state.releases[genesis.digest].manifest == genesis
        assert state.sequence == again.verify() == 3


def test_no_garbage_is_searched_while_a_journal_is_replayed(
    journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.start_cohort(journal)
    journal.close()
    searching: list[bool] = []

    def refuse_the_third(state: State, event: Event) -> None:
        searching.append(gc.isenabled())
        if event.sequence == 3:
            raise JournalCorrupt("the third")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "replay", refuse_the_third)
        patch.setattr(stored, "replay", refuse_the_third)
        for opened in (Journal, verify_journal):
            with pytest.raises(JournalCorrupt, match="the third"):
                opened(f"sqlite:///{path}")
            assert gc.isenabled(), "as it was"
    assert searching == [False] * 6


def test_a_group_with_one_bad_event_changes_nothing(journal: Journal) -> None:
    genesis = make.start_cohort(journal)
    update = make.make_update(genesis)
    with pytest.raises(JournalConflict, match="exists already"):
        journal.append(make.admitted(update), make.admitted(update))
    with journal.read() as state:
        assert state.updates == {}
        assert state.waiting("shared") == []
        assert state.updates_from(update.node_id, genesis.digest) == []
    assert journal.verify() == 3
    assert journal.append(make.admitted(update))[0].sequence == 4


def test_a_refusing_disk_changes_nothing(journal: Journal, path: Path) -> None:
    genesis = make.start_cohort(journal)
    with sqlite3.connect(path) as other:
        other.execute(
            "create trigger full before insert on events "
            "begin select raise(abort, 'disk full'); end"
        )
    with pytest.raises(StorageError):
        journal.append(make.admitted(make.make_update(genesis)))
    with journal.read() as state:
        assert (state.updates, state.sequence) == ({}, 3)
    with sqlite3.connect(path) as other:
        other.execute("drop trigger full")
    assert journal.append(make.admitted(make.make_update(genesis)))[0].sequence == 4


def test_a_second_writer_is_refused(journal: Journal, path: Path) -> None:
    other = Journal(f"sqlite:///{path}")
    make.start_cohort(journal)
    with pytest.raises(StorageError, match="another central"):
        make.start_cohort(other, "zeta")


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("update events set subject = 'x' where sequence = 2", 2),
        ("delete from events where sequence = 2", 3),
        ("update events set body = '{}' where sequence = 3", 3),
    ],
)
def test_an_altered_event_is_named(journal: Journal, path: Path, change: str, number: int) -> None:
    make.start_cohort(journal)
    with sqlite3.connect(path) as other:
        other.execute(change)
    with pytest.raises(JournalCorrupt, match=f"event {number} "):
        journal.verify()
    with pytest.raises(JournalCorrupt, match=f"event {number} "):
        Journal(f"sqlite:///{path}")


def test_an_unusable_place_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        Journal(f"sqlite:///{tmp_path}/absent/journal.db")


def test_wait_wakes_on_append_and_on_wake(journal: Journal) -> None:
    seen: list[object] = []
    stop = threading.Event()
    waiter = threading.Thread(
        target=lambda: seen.append(
            journal.wait(lambda state: state.cohorts() or stop.is_set() or None)
        )
    )
    waiter.start()
    make.start_cohort(journal)
    waiter.join(10)
    assert seen == [["shared"]]
    stopped = threading.Thread(
        target=lambda: seen.append(journal.wait(lambda state: stop.is_set()))
    )
    stopped.start()
    stop.set()
    journal.wake()
    stopped.join(10)
    assert seen[1:] == [True]
    assert journal.wait(lambda state: None, timeout_s=0) is None


def test_listeners_hear_committed_events_in_order_until_unsubscribed(journal: Journal) -> None:
    heard: list[Event] = []
    unsubscribe = journal.add_listener(heard.append)
    genesis = make.start_cohort(journal)
    with pytest.raises(JournalConflict):
        journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", "nobody"))
    unsubscribe()
    journal.append(make.admitted(make.make_update(genesis)))
    assert heard == journal.events(limit=3)


def test_a_closed_journal_takes_nothing(journal: Journal, path: Path) -> None:
    journal.close()
    with pytest.raises(StorageError, match="closed because central stops"):
        make.start_cohort(journal)
    assert Journal(f"sqlite:///{path}").verify() == 0


@pytest.mark.parametrize(
    ("url", "text"), [("sqlite://", "in memory"), ("postgresql+nodriver://x/y", "nodriver")]
)
def test_a_database_that_cannot_keep_a_journal_is_refused(url: str, text: str) -> None:
    with pytest.raises(StorageError, match=text):
        Journal(url)
