"""Unfinished uploads: bytes go only where the bytes on disk end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from central.errors import Refused
from central.intake.partial import STALE_S, PartialUploads

UPDATE = "ab" * 32


def test_pieces_in_order_and_only_in_order(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    assert partial.committed("a", UPDATE) == 0
    partial.write("a", UPDATE, 0, b"one")
    partial.write("a", UPDATE, 3, b"two")
    for offset in (0, 3, 7):
        with pytest.raises(Refused, match="central has 6"):
            partial.write("a", UPDATE, offset, b"x")
    again = PartialUploads(tmp_path)
    assert again.committed("a", UPDATE) == 6
    assert again.path("a", UPDATE).read_bytes() == b"onetwo"


def test_the_quota_counts_the_other_unfinished_updates_of_the_node(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    partial.write("a", UPDATE, 0, b"12345")
    partial.write("a", "cd" * 32, 0, b"123")
    partial.write("b", UPDATE, 0, b"1")
    assert (partial.held_bytes("a", besides=UPDATE), partial.held_bytes("c", besides=UPDATE)) == (3, 0)
    partial.discard("a", "cd" * 32)
    partial.discard("a", "cd" * 32)
    assert partial.held_bytes("a", besides=UPDATE) == 0


def test_what_nobody_continued_for_a_week_is_dropped(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    for update_id in (UPDATE, "cd" * 32):
        partial.write("a", update_id, 0, b"1")
    old = partial.path("a", UPDATE)
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - STALE_S - 1))
    again = PartialUploads(tmp_path)
    assert (again.committed("a", UPDATE), again.committed("a", "cd" * 32)) == (0, 1)
