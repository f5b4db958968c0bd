"""Unfinished uploads: bytes go only where the bytes on disk end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from central.errors import Refused
from central.intake.partial import PartialUploads
from protos.manifest import sha256_hex

DAY_S = 24 * 3600
UPDATE = "ab" * 32


def write(partial: PartialUploads, node_id: str, update_id: str, offset: int, data: bytes) -> str:
    incoming = partial.open(node_id, update_id, offset)
    incoming.write(data)
    incoming.close()
    return incoming.digest


def test_the_digest_is_of_all_bytes_also_of_earlier_streams(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    assert write(partial, "a", UPDATE, 0, b"one") == sha256_hex(b"one")
    assert write(partial, "a", UPDATE, 3, b"two") == sha256_hex(b"onetwo")


@pytest.mark.parametrize("change", ["append", "drop", "replace"])
def test_a_stream_notices_what_another_did_to_its_file(tmp_path: Path, change: str) -> None:
    partial = PartialUploads(tmp_path)
    first = partial.open("a", UPDATE, 0)
    first.write(b"one")
    if change == "append":
        write(partial, "a", UPDATE, 3, b"two")
    else:
        partial.discard("a", UPDATE)
    if change == "replace":
        write(partial, "a", UPDATE, 0, b"eno")
    with pytest.raises(Refused, match="goes on at byte 3"):
        first.write(b"two")
    first.close()


def test_pieces_in_order_and_only_in_order(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    assert partial.committed("a", UPDATE) == 0
    write(partial, "a", UPDATE, 0, b"one")
    write(partial, "a", UPDATE, 3, b"two")
    for offset in (0, 3, 7):
        with pytest.raises(Refused, match="central has 6"):
            write(partial, "a", UPDATE, offset, b"x")
    again = PartialUploads(tmp_path)
    assert again.committed("a", UPDATE) == 6
    assert again.path("a", UPDATE).read_bytes() == b"onetwo"


def test_the_quota_counts_the_other_unfinished_updates_of_the_node(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    write(partial, "a", UPDATE, 0, b"12345")
    write(partial, "a", "cd" * 32, 0, b"123")
    write(partial, "b", UPDATE, 0, b"1")
    assert (partial.held_bytes("a", besides=UPDATE), partial.held_bytes("c", besides=UPDATE)) == (3, 0)
    partial.discard("a", "cd" * 32)
    partial.discard("a", "cd" * 32)
    assert partial.held_bytes("a", besides=UPDATE) == 0


def test_what_nobody_continued_for_a_week_is_dropped(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    for update_id in (UPDATE, "cd" * 32):
        write(partial, "a", update_id, 0, b"1")
    old = partial.path("a", UPDATE)
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - 7 * DAY_S - 1))
    assert partial.stale(8 * DAY_S, drop=True) == (0, 0)
    assert partial.stale(7 * DAY_S, drop=False) == (1, 1)
    assert partial.committed("a", UPDATE) == 1
    assert partial.stale(7 * DAY_S, drop=True) == (1, 1)
    assert (partial.committed("a", UPDATE), partial.committed("a", "cd" * 32)) == (0, 1)
