"""Journals that released versions wrote are read by this one, and mean what they meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from central.backup.format import event_line, read_events
from central.blobs.directory import DirectoryBlobs
from central.heads import keep_head
from central.history import verify_history
from central.journal import (
    EventKind,
    Journal,
    State,
    import_journal,
    read_journal,
    verify_journal,
)
from central.journal.head import Head
from tests.golden.implied_state import implied

FOLDER = Path(__file__).parent
VERSIONS = sorted(path.parent for path in FOLDER.glob("*/journal/journal.db"))


@pytest.fixture(params=VERSIONS, ids=lambda path: path.parent.name)
def recorded(request: pytest.FixtureRequest) -> Path:
    """The folder of one version."""
    folder: Path = request.param
    return folder


@pytest.fixture
def data_dir(recorded: Path, tmp_path: Path) -> Path:
    """A central's data directory with the recorded journal."""
    (tmp_path / "pki").mkdir()
    shutil.copy(recorded / "release.pub.pem", tmp_path / "pki")
    shutil.copy(recorded / "journal.db", tmp_path)
    head = Head.from_bytes((recorded / "journal.head").read_bytes().rstrip(b" "))
    keep_head(tmp_path, DirectoryBlobs(tmp_path / "blobs"), head)
    return tmp_path


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'journal.db'}"


def assert_as_recorded(state: State, recorded: Path) -> None:
    found = json.loads(json.dumps(implied(state)))
    assert_within(json.loads((recorded / "state.json").read_text()), found, "state")


def assert_within(expected: Any, found: Any, where: str) -> None:
    """`found` has what is expected; a later version may add fields to records, and takes none."""
    if isinstance(expected, dict):
        missing = expected.keys() - found.keys()
        assert not missing, f"{where} lacks {sorted(missing)}"
        for key, value in expected.items():
            assert_within(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_within(value, found[number], f"{where}[{number}]")
    else:
        assert found == expected, where


def test_the_hash_of_every_event_is_what_it_was(recorded: Path) -> None:
    events = list(read_events(recorded / "journal.jsonl"))
    lines = [json.loads(line) for line in (recorded / "journal.jsonl").read_text().splitlines()]
    assert [event.expected_hash for event in events] == [line["hash"] for line in lines]


def test_every_kind_of_event_is_recorded() -> None:
    kinds = {event.kind for folder in VERSIONS for event in read_events(folder / "journal.jsonl")}
    assert kinds == set(EventKind), "record a folder for the version to come (README.md)"


def test_a_recorded_database_is_whole_and_means_what_it_meant(
    recorded: Path, data_dir: Path
) -> None:
    store = DirectoryBlobs(data_dir / "blobs")
    state = verify_history(data_dir, url_of(data_dir), store, signatures=True)
    assert_as_recorded(state, recorded)


def test_central_opens_a_recorded_database_and_goes_on(recorded: Path, data_dir: Path) -> None:
    journal = Journal(url_of(data_dir))
    with journal.read() as state:
        assert_as_recorded(state, recorded)
        assert journal.verify() == state.sequence
    journal.close()


def test_a_recorded_export_is_imported_to_the_byte(recorded: Path, tmp_path: Path) -> None:
    export = recorded / "journal.jsonl"
    assert b"".join(map(event_line, read_journal(url_of(recorded)))) == export.read_bytes()
    import_journal(url_of(tmp_path), read_events(export))
    assert b"".join(map(event_line, read_journal(url_of(tmp_path)))) == export.read_bytes()
    assert_as_recorded(verify_journal(url_of(tmp_path)), recorded)
