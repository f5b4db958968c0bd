"""A journal that was lost, rolled back or rewritten is refused by every command that reads it."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa

from central.errors import StorageError
from central.heads import FILE, NOTE
from central.rooms import open_rooms
from tests.contract import central_harness as harness
from tests.contract.central_harness import Run
from tests.contract.lost.befalls import (
    BEFALLS,
    EVENTS,
    OLD,
    Prepared,
    assert_matches,
    deleted,
    head_at,
    kept_files,
    remove_database,
    start,
)
from tests.contract.s3 import BUCKET, S3


@pytest.mark.parametrize("befall", BEFALLS)
def test_a_journal_that_lacks_what_was_acknowledged_is_refused_everywhere(
    original: Prepared,
    data: Path,
    tmp_path: Path,
    run: Run,
    befall: Callable[[Path, Prepared], str],
) -> None:
    expected = befall(data, original)
    for command in (
        ["journal", "verify"],
        ["releases", "verify"],
        ["backup", str(tmp_path / "backups")],
    ):
        code, text = run(data, *command)
        assert code == 5, (command, text)
        assert_matches(expected, text)
    before = kept_files(data)
    with pytest.raises(StorageError, match=f"(?s){expected}"):
        start(original, data)
    assert befall is not deleted or not (data / "journal.db").exists()
    assert kept_files(data) == before, "a start that is refused changes nothing"


def schema_damaged(path: Path) -> None:
    """SQLite's own message then quotes bytes that are no text."""
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE events", b"CREATE\xddTABLE events"))


def body_gone(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(
            "create table other as select * from events"
        )  # which no longer has to have a body
        database.execute("drop table events")
        database.execute("alter table other rename to events")
        database.execute("update events set body = null where sequence = 3")


@pytest.mark.parametrize("damage", [schema_damaged, body_gone], ids=lambda damage: damage.__name__)
def test_a_damaged_database_file_is_one_clear_error(
    original: Prepared, data: Path, run: Run, damage: Callable[[Path], None]
) -> None:
    with sqlite3.connect(data / "journal.db") as database:
        database.execute(f"vacuum into '{data / 'whole.db'}'")
    remove_database(data)
    (data / "whole.db").rename(data / "journal.db")
    damage(data / "journal.db")
    with pytest.raises(StorageError, match=r"cannot be (opened|read)"):
        start(original, data)
    code, text = run(data, "journal", "verify")
    assert code == 5
    assert_matches("cannot be (opened|read)", text)


def test_an_undisturbed_journal_is_whole_and_ahead_of_its_head(
    original: Prepared, data: Path, run: Run
) -> None:
    """A kill between a commit and its head leaves the journal ahead: nothing is lost then."""
    assert start(original, data) == EVENTS
    old = head_at(data, OLD)
    for place in (data / FILE, data / "blobs" / NOTE):
        place.write_bytes(old)
    for command in (["journal", "verify"], ["releases", "verify"]):
        assert run(data, *command)[0] == 0
    assert start(original, data) == EVENTS
    assert json.loads((data / FILE).read_bytes())["sequence"] == EVENTS, "it is written anew"


async def test_a_postgresql_that_was_rolled_back_is_refused(
    tmp_path: Path, postgres: sa.URL, s3: S3
) -> None:
    """Neither head lies in the database; a new data directory leaves the one in the bucket."""
    engines = {
        "journal": {"url": postgres.render_as_string(hide_password=False)},
        "blobs": {"url": f"s3://{BUCKET}/rolled-back", "options": s3.options},
    }
    settings = harness.make_settings(tmp_path, **engines)
    async with harness.running_central(settings) as central:
        token = await central.token()
        await central.enroll("a", token)
        await central.enroll("b", token)
    engine = sa.create_engine(postgres)
    with engine.begin() as connection:
        connection.execute(sa.text("delete from events where sequence = 4"))
    engine.dispose()
    for without_data_dir in (False, True):
        if without_data_dir:
            shutil.copytree(settings.data_dir / "pki", tmp_path / "pki")
            shutil.rmtree(settings.data_dir)
            settings.data_dir.mkdir()
            shutil.move(tmp_path / "pki", settings.data_dir / "pki")
        with (
            pytest.raises(StorageError, match="ends with event 3, but central recorded event 4"),
            ExitStack() as stack,
        ):
            await asyncio.to_thread(open_rooms, settings, stack)
