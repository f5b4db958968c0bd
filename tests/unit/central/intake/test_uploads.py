"""Unfinished uploads: bytes go only where the bytes on disk end."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Refused, StorageError, StorageFull
from central.intake.uploads import READ_BYTES, SYNC_BYTES, Uploads
from lorikeet import durable
from protos.manifest import sha256_hex

DAY_S = 24 * 3600
UPDATE = "ab" * 32


def write(uploads: Uploads, node_id: str, update_id: str, offset: int, data: bytes) -> str:
    upload = uploads.open(node_id, update_id, offset)
    upload.write(data)
    upload.close()
    return upload.digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 2 * READ_BYTES + 5000), min_size=1, max_size=5),
    piece=st.sampled_from([1000, 4096, READ_BYTES]),
)
def test_every_byte_is_written_and_hashed_once_wherever_the_stream_was_cut(
    folder: Path, cuts: list[int], piece: int
) -> None:
    data = some_bytes(sum(cuts))
    uploads = Uploads(folder)
    uploads.discard("a", UPDATE)
    begin = 0
    for size in cuts:
        upload = uploads.open("a", UPDATE, begin)
        for at in range(begin, begin + size, piece):
            upload.write(data[at : min(at + piece, begin + size)])
        begin += size
        assert (upload.size, upload.digest) == (begin, sha256_hex(data[:begin]))
        upload.close()
        assert uploads.committed("a", UPDATE) == begin
    assert uploads.path("a", UPDATE).read_bytes() == data


def some_bytes(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def test_a_kill_leaves_every_piece_that_was_written(tmp_path: Path) -> None:
    data = some_bytes(5000)
    Uploads(tmp_path).open("a", UPDATE, 0).write(data[:3000])  # and no close
    again = Uploads(tmp_path)
    assert again.committed("a", UPDATE) == 3000
    assert write(again, "a", UPDATE, 3000, data[3000:]) == sha256_hex(data)


def test_a_large_upload_is_synced_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    upload = Uploads(tmp_path).open("a", UPDATE, 0)
    monkeypatch.setattr(os, "fdatasync", lambda _: synced.append(upload.size))
    for _ in range(5):
        upload.write(bytes(SYNC_BYTES // 2))
    upload.close()
    assert synced == [SYNC_BYTES // 2, SYNC_BYTES // 2 * 3]


def test_what_central_says_it_has_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, synced = Uploads(tmp_path), []
    write(uploads, "a", UPDATE, 0, b"x")
    monkeypatch.setattr(
        durable.os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
    )
    assert uploads.committed("a", UPDATE) == 1
    assert synced == [str(uploads.path("a", UPDATE)), str(tmp_path / "a")]


@pytest.mark.parametrize("asks", ["the piece", "the question", "the end"])
def test_after_a_failed_sync_every_byte_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: str
) -> None:
    """The disk reports a lost write once; the next sync of the same bytes would succeed."""
    uploads, data = Uploads(tmp_path), some_bytes(SYNC_BYTES)
    upload = uploads.open("a", UPDATE, 0)
    upload.write(data[:-1])

    syncs: dict[str, Callable[[], object]] = {
        "the piece": lambda: upload.write(data[-1:]),
        "the question": lambda: uploads.committed("a", UPDATE),
        "the end": upload.sync,
    }

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(StorageError):
            syncs[asks]()
    assert uploads.committed("a", UPDATE) == 0
    upload.close()
    assert write(uploads, "a", UPDATE, 0, data) == sha256_hex(data)
    assert uploads.path("a", UPDATE).read_bytes() == data


def test_what_half_a_write_left_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, pwrite, data = Uploads(tmp_path), os.pwrite, some_bytes(5000)
    write(uploads, "a", UPDATE, 0, data[:1000])
    counts = iter([1000, None])

    def tear(descriptor: int, left: bytes, offset: int) -> int:
        count = next(counts)
        if count is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, b"?" * count, offset)

    upload = uploads.open("a", UPDATE, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", tear)
        with pytest.raises(StorageFull):
            upload.write(data[1000:])
    upload.close()
    assert uploads.path("a", UPDATE).stat().st_size == 2000
    assert uploads.committed("a", UPDATE) == 1000
    assert write(uploads, "a", UPDATE, 1000, data[1000:]) == sha256_hex(data)
    assert uploads.path("a", UPDATE).read_bytes() == data


def test_a_write_that_takes_less_than_it_was_given_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, data, uploads = os.pwrite, some_bytes(500), Uploads(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda fd, left, offset: pwrite(fd, left[:7], offset))
    assert write(uploads, "a", UPDATE, 0, data) == sha256_hex(data)
    assert uploads.path("a", UPDATE).read_bytes() == data


def test_a_stream_at_a_wrong_offset_changes_nothing(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    early = uploads.open("a", UPDATE, 0)
    write(uploads, "a", UPDATE, 0, b"complete")
    for offset in (0, 3, 9):
        with pytest.raises(Refused, match="central has 8"):
            uploads.open("a", UPDATE, offset)
        assert (uploads.committed("a", UPDATE), uploads.held_bytes("a", "", ())) == (8, 8)
    with pytest.raises(Refused, match="central has 8"):
        early.write(b"EVIL")  # must not reach what may be a blob by another name
    early.close()
    assert uploads.path("a", UPDATE).read_bytes() == b"complete"


def test_a_stream_that_cannot_read_what_came_earlier_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path)
    data = some_bytes(2 * READ_BYTES + 5000)
    write(uploads, "a", UPDATE, 0, data)
    read = os.pread

    def fail(descriptor: int, size: int, offset: int) -> bytes:
        if offset:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            uploads.open("a", UPDATE, len(data))
    assert uploads.committed("a", UPDATE) == len(data)
    assert write(uploads, "a", UPDATE, len(data), b"") == sha256_hex(data)


def test_who_discards_too_late_leaves_the_next_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = Uploads(tmp_path)
    first = uploads.open("a", UPDATE, 0)
    found, find = threading.Event(), uploads._find

    def seen(node_id: str, update_id: str) -> object:
        file = find(node_id, update_id)
        found.set()
        return file

    with first.held():
        monkeypatch.setattr(uploads, "_find", seen)
        late = threading.Thread(target=uploads.discard, args=("a", UPDATE))
        late.start()
        assert found.wait(10)
        uploads.discard("a", UPDATE)
        write(uploads, "a", UPDATE, 0, b"again")
    late.join(10)
    first.close()
    assert uploads.committed("a", UPDATE) == 5


def test_nobody_waits_while_earlier_bytes_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a gigabyte takes seconds to read."""
    uploads, read, others = Uploads(tmp_path), os.pread, []
    write(uploads, "a", UPDATE, 0, bytes(READ_BYTES))

    def slow(*arguments: Any) -> bytes:
        others.append(threading.Thread(target=uploads.discard, args=("a", UPDATE), daemon=True))
        others[-1].start()
        others[-1].join(5)
        assert not others[-1].is_alive()
        return read(*arguments)

    monkeypatch.setattr(os, "pread", slow)
    upload = uploads.open("a", UPDATE, READ_BYTES)
    assert len(others) == 1
    with pytest.raises(Refused, match="dropped"):
        upload.write(b"x")
    upload.close()


def test_a_stream_discards_its_own_file_only(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    first = uploads.open("a", UPDATE, 0)
    uploads.discard_own(first)
    write(uploads, "a", UPDATE, 0, b"afresh")
    uploads.discard_own(first)
    assert uploads.committed("a", UPDATE) == 6
    first.close()
    assert uploads.committed("a", UPDATE) == 6


def test_admitted_updates_leave_nothing_here(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    for node in ("a", "b"):
        write(uploads, node, UPDATE, 0, b"1")
    write(uploads, "a", "cd" * 32, 0, b"1")
    uploads.discard_all({UPDATE: None})
    assert [path.stem for path in tmp_path.rglob("*.part")] == ["cd" * 32]


def test_the_digest_is_of_all_bytes_also_of_earlier_streams(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    assert write(uploads, "a", UPDATE, 0, b"one") == sha256_hex(b"one")
    assert write(uploads, "a", UPDATE, 3, b"two") == sha256_hex(b"onetwo")


@pytest.mark.parametrize("change", ["append", "drop", "replace"])
def test_a_stream_notices_what_another_did_to_its_file(tmp_path: Path, change: str) -> None:
    uploads = Uploads(tmp_path)
    first = uploads.open("a", UPDATE, 0)
    first.write(b"one")
    if change == "append":
        write(uploads, "a", UPDATE, 3, b"two")
    else:
        uploads.discard("a", UPDATE)
    if change == "replace":
        write(uploads, "a", UPDATE, 0, b"eno")
    with pytest.raises(Refused, match="goes on at byte 3"):
        first.write(b"two")
    first.close()


def test_pieces_in_order_and_only_in_order(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    assert uploads.committed("a", UPDATE) == 0
    write(uploads, "a", UPDATE, 0, b"one")
    write(uploads, "a", UPDATE, 3, b"two")
    for offset in (0, 3, 7):
        with pytest.raises(Refused, match="central has 6"):
            write(uploads, "a", UPDATE, offset, b"x")
    again = Uploads(tmp_path)
    assert again.committed("a", UPDATE) == 6
    assert again.path("a", UPDATE).read_bytes() == b"onetwo"


def test_the_quota_counts_the_other_unfinished_updates_of_the_node(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    write(uploads, "a", UPDATE, 0, b"12345")
    write(uploads, "a", "cd" * 32, 0, b"123")
    write(uploads, "b", UPDATE, 0, b"1")
    assert (uploads.held_bytes("a", UPDATE, ()), uploads.held_bytes("c", UPDATE, ())) == (3, 0)
    assert uploads.held_bytes("a", UPDATE, {"cd" * 32}) == 0  # its bytes are among the blobs
    uploads.discard("a", "cd" * 32)
    uploads.discard("a", "cd" * 32)
    assert uploads.held_bytes("a", UPDATE, ()) == 0


def test_what_nobody_continued_for_a_week_is_dropped(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    for update_id in (UPDATE, "cd" * 32):
        write(uploads, "a", update_id, 0, b"1")
    old = uploads.path("a", UPDATE)
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - 7 * DAY_S - 1))
    uploads = Uploads(tmp_path)
    assert uploads.stale(8 * DAY_S, drop=True) == (0, 0)
    assert uploads.stale(7 * DAY_S, drop=False) == (1, 1)
    assert uploads.committed("a", UPDATE) == 1
    assert uploads.stale(7 * DAY_S, drop=True) == (1, 1)
    assert (uploads.committed("a", UPDATE), uploads.committed("a", "cd" * 32)) == (0, 1)


def test_a_clock_that_is_set_makes_no_upload_older_or_younger(tmp_path: Path) -> None:
    steady = [0.0]
    uploads = Uploads(tmp_path, clock=lambda: steady[0])
    write(uploads, "a", UPDATE, 0, b"1")
    path = uploads.path("a", UPDATE)
    os.utime(path, (0, 0))  # the machine's clock is set, one way or the other
    steady[0] += 7 * DAY_S - 1
    assert uploads.stale(7 * DAY_S, drop=False) == (0, 0)
    os.utime(path, (2**40, 2**40))
    steady[0] += 1
    assert uploads.stale(7 * DAY_S, drop=False) == (1, 1)

    again = Uploads(tmp_path, clock=lambda: steady[0])  # the time of the file lies ahead
    assert again.stale(1, drop=False) == (0, 0)
    steady[0] += 7 * DAY_S
    assert again.stale(7 * DAY_S, drop=True) == (1, 1)
