"""Backups that were altered or are unfinished are refused; nothing is overwritten."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.backup.builders import Prepared, files, newest
from tests.contract.central_harness import Run


def alter_line(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    number = next(index for index, line in enumerate(lines) if b'"kind":"update_admitted"' in line)
    lines[number] = lines[number].replace(b'"cohort":"shared"', b'"cohort":"stolen"')
    path.write_bytes(b"".join(lines))
    return rf"journal.jsonl was altered: Journal event {number + 1} \(update_admitted of"


def cut_journal(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    return r"has \d+ events, the last with hash .* its manifest says \d+"


def half_a_line(directory: Path) -> str:
    path = newest(directory) / "journal.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    return r"line \d+ is no event"


def alter_manifest(directory: Path) -> str:
    (newest(directory) / "manifest.json").write_text("{}")
    return r"manifest.json was altered"


def alter_key(directory: Path) -> str:
    (newest(directory) / "pki" / "release.key").write_text("other")
    return r"release.key was altered"


def lose_blob(directory: Path) -> str:
    blob = min(path for path in (directory / "blobs").rglob("*") if path.is_file())
    blob.unlink()
    return rf"1 of \d+ blobs of backup .* are missing, the first one {blob.name}"


def alter_blob(directory: Path) -> str:
    blob = max(path for path in (directory / "blobs").rglob("*") if path.is_file())
    blob.write_bytes(b"other")
    return rf"{blob.name} was altered: its digest is"


def half_a_backup(directory: Path) -> str:
    (path := newest(directory)).rename(path.with_name(f"{path.name}.tmp"))
    return r"has no finished backup. Its backups: .*\.tmp; what ends in .tmp was never finished"


def no_backup(directory: Path) -> str:
    shutil.rmtree(directory)
    return r"has no finished backup. Its backups: none"


@pytest.mark.parametrize(
    "spoil",
    [
        alter_line,
        cut_journal,
        half_a_line,
        alter_manifest,
        alter_key,
        lose_blob,
        alter_blob,
        half_a_backup,
        no_backup,
    ],
)
def test_a_spoilt_backup_is_refused_by_name(
    backups: Path, tmp_path: Path, run: Run, spoil: Callable[[Path], str]
) -> None:
    directory = tmp_path / "backups"
    shutil.copytree(backups, directory)
    expected = spoil(directory)
    for arguments in (["--check"], []):
        code, text = run(tmp_path / "new", "restore", str(directory), *arguments)
        assert code == 5, text
        assert re.search(expected, text), text
    assert not (tmp_path / "new" / "journal.db").exists()
    if spoil is not alter_blob:  # which is found while it is copied; the restore is unfinished then
        assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(
    prepared: Prepared, backups: Path, tmp_path: Path, run: Run
) -> None:
    data = tmp_path / "central"
    shutil.copytree(prepared.settings.data_dir, data)
    before = files(data)
    code, text = run(data, "restore", str(backups))
    assert (code, "is not empty: it holds blobs, journal.db" in text) == (5, True), text
    assert files(data) == before
    for place in (data, data / "blobs" / "x", tmp_path):
        code, text = run(data, "backup", str(place))
        assert (code, "A backup cannot lie in" in text) == (5, True), text
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    code, text = run(data, "backup", str(tmp_path / "photos"))
    assert (code, "holds cat.jpg. Expected an empty or new directory" in text) == (5, True), text
    code, text = run(tmp_path / "nothing", "backup", str(tmp_path / "b"))
    assert code == 5, text
