"""Durable files: whole or not at all, under their name or under none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lorikeet.durable import publish_link, remove_temporary_files, write_file


def test_a_file_takes_the_place_of_another_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "x", b"one")
    write_file(tmp_path / "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_new_file_has_its_mode_from_the_start(tmp_path: Path, mode: int) -> None:
    write_file(tmp_path / "x", b"secret", mode)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_a_disk_that_refuses_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(tmp_path / "x", b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_link_never_takes_the_place_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "kept").write_bytes(b"kept")
    assert publish_link(tmp_path / "new", tmp_path / "kept")
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert publish_link(tmp_path / "new", tmp_path / "other")
    assert (tmp_path / "other").samefile(tmp_path / "new")


def test_only_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "x.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "room" / "x").write_bytes(b"whole")
    remove_temporary_files(tmp_path)
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["x"]
    remove_temporary_files(tmp_path / "absent")
