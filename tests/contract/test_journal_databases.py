"""One contract for the journal, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from central.errors import StorageError
from central.journal import Journal, JournalConflict, JournalCorrupt, verify_journal
from central.journal.migrations.upgrade import HEAD, configuration
from central.journal.table import METADATA
from tests.unit.central import builders as make


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/journal.db"
    found: sa.URL = request.getfixturevalue("postgres")
    return found.render_as_string(hide_password=False)


def execute(url: str, statement: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


def test_a_reopened_journal_has_the_same_chain_and_state(url: str) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    update = make.make_update(genesis)
    journal.append(make.admitted(update))
    before = journal.events()
    journal.close()
    again = Journal(url)
    assert again.events() == before
    assert [event.hash for event in before] == [event.expected_hash for event in before]
    with again.read() as state:
        assert [waiting.update_id for waiting in state.waiting("shared")] == [update.digest]
        assert state.sequence == again.verify() == len(before)
    again.close()


def test_text_comes_back_to_the_byte(url: str) -> None:
    journal = Journal(url)
    make.start_cohort(journal)
    with journal.read() as state:
        node = next(iter(state.nodes))
    text = "Größe 日本語 \U0001f426 \\ ' \" \n"
    update = make.make_update(make.make_release(), node, software=text)
    journal.append(make.admitted(update))
    journal.close()
    again = Journal(url)
    with again.read() as state:
        assert state.updates[update.digest].manifest.software == text
    again.close()


def test_a_group_with_one_bad_event_changes_nothing(url: str) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    update = make.make_update(genesis)
    count = journal.verify()
    with pytest.raises(JournalConflict, match="exists already"):
        journal.append(make.admitted(update), make.admitted(update))
    assert journal.verify() == count
    assert journal.append(make.admitted(update))[0].sequence == count + 1
    journal.close()


def test_a_second_writer_is_refused(url: str) -> None:
    journal, other = Journal(url), Journal(url)
    make.start_cohort(journal)
    with pytest.raises(StorageError, match="another central"):
        make.start_cohort(other, "zeta")
    with other.read() as state:
        assert state.cohorts() == []
    journal.close()
    other.close()


def test_a_refusing_database_changes_nothing(url: str) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    count = journal.verify()
    execute(url, "alter table events rename to elsewhere")
    with pytest.raises(StorageError):
        journal.append(make.admitted(make.make_update(genesis)))
    execute(url, "alter table elsewhere rename to events")
    with journal.read() as state:
        assert (state.updates, state.sequence) == ({}, count)
    assert journal.append(make.admitted(make.make_update(genesis)))[0].sequence == count + 1
    journal.close()


def test_a_database_that_vanishes_during_the_commit_costs_no_event(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has recorded the events, and central was not told."""
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    count, heard = journal.verify(), list[str]()
    journal.add_listener(lambda event: heard.append(event.subject))
    dialect = journal._engine.dialect
    commit, first, second = dialect.do_commit, make.make_update(genesis), make.make_update(genesis, sequence=2)

    def vanish(connection: object) -> None:
        commit(connection)
        raise sa.exc.OperationalError("commit", {}, Exception("server closed the connection unexpectedly"))

    with monkeypatch.context() as patch:
        patch.setattr(dialect, "do_commit", vanish)
        with pytest.raises(StorageError, match="closed the connection"):
            journal.append(make.admitted(first))
    with journal.read() as state:
        assert (state.sequence, heard) == (count, [])
    with pytest.raises(JournalConflict, match=f"event {count + 1} .update_admitted. was recorded"):
        journal.append(make.admitted(second))
    with journal.read() as state:
        assert (list(state.updates), heard) == ([first.digest], [first.digest])
    assert journal.append(make.admitted(second))[0].sequence == count + 2
    assert journal.verify() == count + 2
    journal.close()


def test_a_commit_that_never_came_is_no_obstacle(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    update = make.make_update(genesis)

    def vanish(connection: object) -> None:
        raise sa.exc.OperationalError("commit", {}, Exception("server closed the connection unexpectedly"))

    with monkeypatch.context() as patch:
        patch.setattr(journal._engine.dialect, "do_commit", vanish)
        for _ in range(2):
            with pytest.raises(StorageError):
                journal.append(make.admitted(update))
    journal.append(make.admitted(update))
    assert [event.subject for event in journal.events()][-1] == update.digest
    journal.close()


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ("update events set subject = 'x' where sequence = 2", 2),
        ("delete from events where sequence = 2", 3),
        ("update events set body = '{}' where sequence = 3", 3),
        ("""update events set body = '{"uses": NaN}' where sequence = 2""", 2),
        (r"""update events set body = '{"uses": "\ud800"}' where sequence = 2""", 2),
        (f"update events set body = '{'[' * 100_000}' where sequence = 2", 2),
        ("update events set sequence = -2 where sequence = 2", 3),
    ],
)
def test_an_altered_event_is_named(url: str, change: str, number: int) -> None:
    journal = Journal(url)
    make.start_cohort(journal)
    execute(url, change)
    for check in (journal.verify, lambda: Journal(url), lambda: verify_journal(url)):
        with pytest.raises(JournalCorrupt, match=f"event {number} "):
            check()
    journal.close()


def test_many_threads_append_in_one_chain(url: str) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    count = journal.verify()

    def append(number: int) -> None:
        journal.append(make.admitted(make.make_update(genesis, sequence=number)))

    threads = [threading.Thread(target=append, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert journal.verify() == count + 8
    last = verify_journal(url)
    assert last is not None
    assert last.sequence == count + 8
    journal.close()


# The schema.


def revision(url: str) -> str:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        (value,) = connection.execute(sa.text("select version_num from alembic_version")).scalars()
    engine.dispose()
    return str(value)


def test_the_revisions_make_todays_tables(url: str) -> None:
    """A database that was migrated from nothing has the tables that a new one gets at once."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        config = configuration()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()
    assert revision(url) == HEAD
    journal = Journal(url)
    make.start_cohort(journal)
    journal.close()


def test_a_database_from_before_there_were_revisions_is_adopted(url: str) -> None:
    journal = Journal(url)
    make.start_cohort(journal)
    before = journal.events()
    journal.close()
    execute(url, "drop table alembic_version")
    execute(url, "alter table events drop column seal")
    again = Journal(url)
    assert again.events() == before
    assert revision(url) == HEAD
    again.close()


def test_a_start_that_was_killed_before_it_made_the_tables_is_repaired(url: str) -> None:
    Journal(url).close()
    execute(url, "drop table events")
    journal = Journal(url)
    make.start_cohort(journal)
    assert revision(url) == HEAD
    journal.close()


def test_a_schema_of_newer_software_is_refused_and_left_alone(url: str) -> None:
    Journal(url).close()
    execute(url, "update alembic_version set version_num = '9999'")
    with pytest.raises(StorageError, match="'9999'; this central knows 0001"):
        Journal(url)
    assert revision(url) == "9999"
