"""One contract for the journal, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
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

ROOT = Path(__file__).resolve().parents[2]


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


VANISHES = """
import os, sys
import sqlalchemy as sa
from central.journal import Journal
from tests.unit.central import builders as make

url, first_it_commits = sys.argv[1], sys.argv[2] == "commits"
journal = Journal(url)
with journal.read() as state:
    genesis = state.genesis("shared").manifest
journal.add_listener(lambda event: print("heard", event.subject, flush=True))
dialect = journal._engine.dialect
commit = dialect.do_commit

def vanish(connection):
    if first_it_commits:
        commit(connection)
    if sys.argv[3] == "no memory":
        raise MemoryError
    lost = Exception("server closed the connection unexpectedly")
    raise sa.exc.OperationalError("commit", {}, lost)

dialect.do_commit = vanish
try:
    journal.append(make.admitted(make.make_update(genesis)))
finally:
    print("went on", flush=True)
"""


@pytest.mark.parametrize("why", ["connection lost", "no memory"])
@pytest.mark.parametrize("commits", [True, False])
def test_a_commit_in_doubt_ends_the_process_and_the_next_start_knows(
    url: str, commits: bool, why: str
) -> None:
    """Nobody was told anything, so the update is sent again: it is recorded once in the end."""
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    count = journal.verify()
    journal.close()
    ended = subprocess.run(
        [sys.executable, "-c", VANISHES, url, "commits" if commits else "is lost", why],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (StorageError.exit_code, ""), ended.stderr
    assert f"event {count + 1} (update_admitted) is recorded or is not" in ended.stderr
    again, update = Journal(url), make.make_update(genesis)
    with again.read() as state:
        assert list(state.updates) == ([update.digest] if commits else [])
    if not commits:
        again.append(make.admitted(update))
    assert again.verify() == count + 1
    again.close()


APPENDS = """
import sys
from central.journal import Journal
from tests.unit.central import builders as make

journal = Journal(sys.argv[1])
with journal.read() as state:
    genesis = state.genesis("shared").manifest
journal.append(make.admitted(make.make_update(genesis)))
print("went on", flush=True)
"""
ENDS_AT_COMMIT = """
create function end_backend() returns trigger language plpgsql as $$
begin
  perform pg_terminate_backend(pg_backend_pid());
  perform pg_sleep(10);
  return null;
end $$;
create constraint trigger ends after insert on events deferrable initially deferred
  for each row execute function end_backend()
"""


def test_a_real_connection_that_is_lost_at_the_commit_ends_the_process(postgres: sa.URL) -> None:
    url = postgres.render_as_string(hide_password=False)
    journal = Journal(url)
    make.start_cohort(journal)
    count = journal.verify()
    journal.close()
    execute(url, ENDS_AT_COMMIT)
    ended = subprocess.run(
        [sys.executable, "-c", APPENDS, url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (StorageError.exit_code, ""), ended.stderr
    assert "central ends: the database failed during a commit" in ended.stderr
    execute(url, "drop trigger ends on events")
    again = Journal(url)
    assert again.verify() == count
    again.close()


def test_a_database_that_vanishes_before_the_commit_costs_no_event(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(url)
    genesis = make.start_cohort(journal)
    update = make.make_update(genesis)

    def vanish(*_: object) -> None:
        lost = Exception("server closed the connection unexpectedly")
        raise sa.exc.OperationalError("insert", {}, lost)

    with monkeypatch.context() as patch:
        patch.setattr(journal._engine.dialect, "do_executemany", vanish)
        patch.setattr(journal._engine.dialect, "do_execute", vanish)
        for _ in range(2):
            with pytest.raises(StorageError, match="closed the connection"):
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
    with pytest.raises(StorageError, match=r"'9999'; this central knows 0001\."):
        Journal(url)
    assert revision(url) == "9999"
