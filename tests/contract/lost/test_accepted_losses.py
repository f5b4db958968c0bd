"""An operator accepts a loss by one command; a forgery is never accepted, nor an older backup."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from central import faults
from central.errors import StorageError
from central.heads import FILE, NOTE
from central.journal import EventKind, read_journal
from central.rooms import open_rooms
from tests.contract import central_harness as harness
from tests.contract.central_harness import Run
from tests.contract.lost.befalls import (
    EVENTS,
    OLD,
    Prepared,
    assert_matches,
    both_heads_lost,
    deleted,
    everything_but_blobs_lost,
    head_at,
    last_event_dropped,
    older_file,
    older_file_that_went_on,
    rewritten_and_longer,
    start,
    update_removed,
)


@pytest.mark.parametrize(
    "befall",
    [
        deleted,
        last_event_dropped,
        older_file,
        older_file_that_went_on,
        both_heads_lost,
        everything_but_blobs_lost,
    ],
)
def test_a_loss_is_accepted_by_one_command(
    original: Prepared, data: Path, run: Run, befall: Callable[[Path, Prepared], str]
) -> None:
    befall(data, original)
    head = (data / "blobs" / NOTE).read_bytes() if (data / "blobs" / NOTE).exists() else b""
    code, text = run(data, "journal", "accept-loss")
    assert (code, "Nothing was changed" in text) == (1, True), text
    with pytest.raises(StorageError):
        start(original, data)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "This is accepted" in text) == (0, True), text
    count = start(original, data)
    code, text = run(data, "journal", "verify", "--json")
    assert code == 0, text
    assert len(json.loads(text)["unnamed_blobs"]) == {1: 5, EVENTS: 1, EVENTS + 1: 0}.get(count, 2)
    *_, last = read_journal(f"sqlite:///{data}/journal.db")
    assert last.kind is EventKind.JOURNAL_LOSS_ACCEPTED
    if head:
        lost = json.loads(head)
        assert (last.body["sequence"], last.body["hash"]) == (lost["sequence"], lost["hash"])
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "Nothing is missing" in text) == (0, True), text
    assert start(original, data) == count


@pytest.mark.parametrize("befall", [update_removed, rewritten_and_longer])
def test_a_forgery_is_never_accepted(
    original: Prepared, data: Path, run: Run, befall: Callable[[Path, Prepared], str]
) -> None:
    befall(data, original)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert (code, "is not signed by this central's release.key" in text) == (5, True), text
    with pytest.raises(StorageError):
        start(original, data)


@pytest.mark.parametrize(
    "fault",
    [
        "journal.journal_loss_accepted.applied#1",
        "journal.journal_loss_accepted.stored#1",
        "head.kept#1",
    ],
)
def test_a_word_that_is_killed_is_given_again(
    original: Prepared, data: Path, run: Run, fault: str
) -> None:
    older_file(data, original)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("CENTRAL_")
    }
    done = subprocess.run(
        [sys.executable, "-m", "central.cli", "journal", "accept-loss", "--yes"],
        check=False, capture_output=True, timeout=60,
        env=environment | {"CENTRAL_DATA_DIR": str(data), faults.VARIABLE: fault},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    with pytest.raises(StorageError):
        start(original, data)
    code, text = run(data, "journal", "accept-loss", "--yes")
    assert code == 0, text
    assert start(original, data) > OLD


def test_a_directory_in_which_no_central_ran_has_no_loss(tmp_path: Path, run: Run) -> None:
    code, text = run(tmp_path, "journal", "accept-loss", "--yes")
    assert (code, "No central ran in" in text) == (5, True), text
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_store_that_is_handed_over_is_no_sign_of_a_loss(
    original: Prepared, data: Path, tmp_path: Path
) -> None:
    for name in ("owner", NOTE):
        (data / "blobs" / name).unlink()
    settings = harness.make_settings(tmp_path / "second", blobs={"url": str(data / "blobs")})
    with ExitStack() as stack:
        open_rooms(settings, stack)
    with ExitStack() as stack:
        open_rooms(settings, stack)


def test_an_older_backup_is_not_restored_over_what_is_known_to_be_newer(
    original: Prepared, tmp_path: Path, run: Run
) -> None:
    blobs = tmp_path / "blobs"
    shutil.copytree(original.settings.data_dir / "blobs", blobs)
    place, old = {"CENTRAL_BLOBS__URL": str(blobs)}, tmp_path / "old"
    shutil.copytree(original.settings.data_dir, old)
    older_file(old, original)
    for stale in (old / FILE, old / "blobs" / NOTE):
        stale.unlink()
        stale.write_bytes(head_at(old, OLD))
    assert run(old, "backup", str(tmp_path / "backups"))[0] == 0
    code, text = run(tmp_path / "new", "restore", str(tmp_path / "backups"), **place)
    assert code == 5, text
    assert_matches(
        "is older than what central recorded.*Events 9 to 10 are missing.*--accept-loss", text
    )
    assert [path.name for path in (tmp_path / "new").iterdir() if ".lock" not in path.name] == []
    code, text = run(
        tmp_path / "new", "restore", str(tmp_path / "backups"), "--accept-loss", **place
    )
    assert code == 0, text
    code, text = run(tmp_path / "new", "journal", "verify", "--json", **place)
    assert (code, json.loads(text)["events"], len(json.loads(text)["unnamed_blobs"])) == (
        0,
        OLD,
        2,
    ), text
