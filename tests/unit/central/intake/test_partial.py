"""Unfinished uploads: bytes go only where the bytes on disk end."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Refused, StorageError
from central.intake import direct
from central.intake.direct import WINDOW_BYTES
from central.intake.partial import Incoming, PartialUploads
from protos.manifest import sha256_hex

DAY_S = 24 * 3600
UPDATE = "ab" * 32


def unseen(_: memoryview) -> None:
    """Inspects nothing."""


def take(incoming: Incoming, data: bytes) -> None:
    """As the service does: what is full goes to disk."""
    rest = memoryview(data)
    while rest:
        incoming.catch_up()
        rest = incoming.take(rest)
        if incoming.is_full:
            incoming.write()


def write(partial: PartialUploads, node_id: str, update_id: str, offset: int, data: bytes) -> str:
    incoming = partial.open(node_id, update_id, offset, unseen)
    take(incoming, data)
    incoming.write()
    incoming.close()
    return incoming.digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 2 * WINDOW_BYTES + 5000), min_size=1, max_size=5),
    piece=st.sampled_from([1000, 4096, WINDOW_BYTES, 3 * WINDOW_BYTES]),
    is_direct=st.booleans(),
)
def test_every_byte_is_written_hashed_and_seen_once_wherever_the_stream_was_cut(
    folder: Path, cuts: list[int], piece: int, is_direct: bool
) -> None:
    data = some_bytes(sum(cuts))
    with pytest.MonkeyPatch.context() as patch:
        if not is_direct:
            patch.setattr(direct, "_DIRECT", 0)
        partial = PartialUploads(folder)
        partial.discard("a", UPDATE)
        begin = 0
        for size in cuts:
            seen = bytearray()
            incoming = partial.open("a", UPDATE, begin, seen.extend)
            for at in range(begin, begin + size, piece):
                take(incoming, data[at : min(at + piece, begin + size)])
            begin += size
            if begin == len(data):
                incoming.write()
                assert (incoming.digest, bytes(seen)) == (sha256_hex(data), data)
            incoming.close()
            assert partial.committed("a", UPDATE) == begin
        assert partial.path("a", UPDATE).read_bytes() == data


def some_bytes(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def test_what_a_kill_leaves_is_all_but_the_window(tmp_path: Path) -> None:
    data = some_bytes(2 * WINDOW_BYTES + 1000)
    take(PartialUploads(tmp_path).open("a", UPDATE, 0, unseen), data)  # and no close
    again = PartialUploads(tmp_path)
    assert again.committed("a", UPDATE) == 2 * WINDOW_BYTES
    assert write(again, "a", UPDATE, 2 * WINDOW_BYTES, data[2 * WINDOW_BYTES :]) == sha256_hex(data)


def test_a_complete_file_is_never_written_again(tmp_path: Path) -> None:
    """It may be a blob by another name."""
    partial = PartialUploads(tmp_path)
    data = some_bytes(5000)
    write(partial, "a", UPDATE, 0, data)
    path = partial.path("a", UPDATE)
    path.chmod(0o600)
    before = path.stat().st_mtime_ns
    incoming = PartialUploads(tmp_path).open("a", UPDATE, 5000, unseen)
    incoming.write()
    assert incoming.digest == sha256_hex(data)
    incoming.close()
    assert path.stat().st_mtime_ns == before


def test_a_stream_at_a_wrong_offset_changes_nothing(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    early = partial.open("a", UPDATE, 0, unseen)
    write(partial, "a", UPDATE, 0, b"complete")
    for offset in (0, 3, 9):
        with pytest.raises(Refused, match="central has 8"):
            partial.open("a", UPDATE, offset, unseen)
        assert (partial.committed("a", UPDATE), partial.held_bytes("a", "", ())) == (8, 8)
    take(early, b"EVIL")  # must not reach what may be a blob by another name
    with pytest.raises(Refused, match="central has 8"):
        early.write()
    early.close()
    assert partial.path("a", UPDATE).read_bytes() == b"complete"


def test_a_stream_that_cannot_read_what_came_earlier_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = PartialUploads(tmp_path)
    data = some_bytes(2 * WINDOW_BYTES + 5000)
    write(partial, "a", UPDATE, 0, data)
    read = os.preadv

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset:
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            partial.open("a", UPDATE, len(data), unseen)
    assert partial.committed("a", UPDATE) == len(data)
    assert write(partial, "a", UPDATE, len(data), b"") == sha256_hex(data)


@pytest.mark.skipif(not direct._DIRECT, reason="no O_DIRECT on this system")
def test_a_disk_with_larger_blocks_is_used_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems do: the file opens with O_DIRECT, and then nothing can be read or written so."""

    def refuse(call: Callable[..., int]) -> Callable[..., int]:
        def checked(descriptor: int, data: object, offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & direct._DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return call(descriptor, data, offset)

        return checked

    for name in ("preadv", "pwrite"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    partial, data = PartialUploads(tmp_path), some_bytes(3 * WINDOW_BYTES + 5000)
    cut = WINDOW_BYTES + 4096
    write(partial, "a", UPDATE, 0, data[:cut])
    assert write(partial, "a", UPDATE, cut, data[cut:]) == sha256_hex(data)
    assert partial.path("a", UPDATE).read_bytes() == data


def test_who_discards_too_late_leaves_the_next_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = PartialUploads(tmp_path)
    first = partial.open("a", UPDATE, 0, unseen)
    found, find = threading.Event(), partial._find

    def seen(node_id: str, update_id: str) -> object:
        file = find(node_id, update_id)
        found.set()
        return file

    with first.held():
        monkeypatch.setattr(partial, "_find", seen)
        late = threading.Thread(target=partial.discard, args=("a", UPDATE))
        late.start()
        assert found.wait(10)
        partial.discard("a", UPDATE)
        write(partial, "a", UPDATE, 0, b"again")
    late.join(10)
    first.close()
    assert partial.committed("a", UPDATE) == 5


def test_nobody_waits_while_earlier_bytes_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who discards an admitted update answers all nodes, and half a gigabyte takes seconds to read."""
    partial, read, others = PartialUploads(tmp_path), os.preadv, []
    write(partial, "a", UPDATE, 0, bytes(WINDOW_BYTES))

    def slow(*arguments: Any) -> int:
        others.append(threading.Thread(target=partial.discard, args=("a", UPDATE), daemon=True))
        others[-1].start()
        others[-1].join(5)
        assert not others[-1].is_alive()
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", slow)
    incoming = partial.open("a", UPDATE, WINDOW_BYTES, unseen)
    assert len(others) == 1
    with pytest.raises(Refused, match="dropped"):
        incoming.write()
    incoming.close()


def test_who_goes_on_holds_no_window_before_bytes_come(tmp_path: Path) -> None:
    """After a cut of the network every site does."""
    partial = PartialUploads(tmp_path)
    earlier = bytes(WINDOW_BYTES) + b"earlier"
    write(partial, "a", UPDATE, 0, earlier)
    incoming = partial.open("a", UPDATE, len(earlier), unseen)
    assert incoming.is_behind
    assert len(partial._windows._unused) == 1
    incoming.catch_up()
    assert not partial._windows._unused
    take(incoming, b" and later")
    incoming.write()
    incoming.close()
    assert incoming.digest == sha256_hex(earlier + b" and later")
    assert len(partial._windows._unused) == 1


def test_a_stream_discards_its_own_file_only(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    first = partial.open("a", UPDATE, 0, unseen)
    partial.discard_own(first)
    write(partial, "a", UPDATE, 0, b"afresh")
    partial.discard_own(first)
    assert partial.committed("a", UPDATE) == 6
    first.close()
    assert partial.committed("a", UPDATE) == 6


def test_memory_that_is_refused_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    incoming = PartialUploads(tmp_path).open("a", UPDATE, 0, unseen)
    monkeypatch.setattr(direct.mmap, "mmap", refuse)
    with pytest.raises(StorageError, match="Cannot allocate memory"):
        incoming.take(memoryview(b"x"))
    incoming.close()


def test_windows_are_used_again(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    for number in range(3):
        write(partial, "a", f"{number:064}", 0, b"x")
    assert len(partial._windows._unused) == 1


def test_admitted_updates_leave_nothing_here(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    for node in ("a", "b"):
        write(partial, node, UPDATE, 0, b"1")
    write(partial, "a", "cd" * 32, 0, b"1")
    partial.discard_all({UPDATE: None})
    assert [path.stem for path in tmp_path.rglob("*.part")] == ["cd" * 32]


def test_the_digest_is_of_all_bytes_also_of_earlier_streams(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    assert write(partial, "a", UPDATE, 0, b"one") == sha256_hex(b"one")
    assert write(partial, "a", UPDATE, 3, b"two") == sha256_hex(b"onetwo")


@pytest.mark.parametrize("change", ["append", "drop", "replace"])
def test_a_stream_notices_what_another_did_to_its_file(tmp_path: Path, change: str) -> None:
    partial = PartialUploads(tmp_path)
    first = partial.open("a", UPDATE, 0, unseen)
    take(first, b"one")
    first.save()
    if change == "append":
        write(partial, "a", UPDATE, 3, b"two")
    else:
        partial.discard("a", UPDATE)
    if change == "replace":
        write(partial, "a", UPDATE, 0, b"eno")
    take(first, b"two")
    with pytest.raises(Refused, match="goes on at byte 3"):
        first.write()
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
    assert (partial.held_bytes("a", UPDATE, ()), partial.held_bytes("c", UPDATE, ())) == (3, 0)
    assert partial.held_bytes("a", UPDATE, {"cd" * 32}) == 0  # its bytes are among the blobs
    partial.discard("a", "cd" * 32)
    partial.discard("a", "cd" * 32)
    assert partial.held_bytes("a", UPDATE, ()) == 0


def test_what_nobody_continued_for_a_week_is_dropped(tmp_path: Path) -> None:
    partial = PartialUploads(tmp_path)
    for update_id in (UPDATE, "cd" * 32):
        write(partial, "a", update_id, 0, b"1")
    old = partial.path("a", UPDATE)
    os.utime(old, (old.stat().st_atime, old.stat().st_mtime - 7 * DAY_S - 1))
    partial = PartialUploads(tmp_path)
    assert partial.stale(8 * DAY_S, drop=True) == (0, 0)
    assert partial.stale(7 * DAY_S, drop=False) == (1, 1)
    assert partial.committed("a", UPDATE) == 1
    assert partial.stale(7 * DAY_S, drop=True) == (1, 1)
    assert (partial.committed("a", UPDATE), partial.committed("a", "cd" * 32)) == (0, 1)


def test_a_clock_that_is_set_makes_no_upload_older_or_younger(tmp_path: Path) -> None:
    steady = [0.0]
    partial = PartialUploads(tmp_path, clock=lambda: steady[0])
    write(partial, "a", UPDATE, 0, b"1")
    path = partial.path("a", UPDATE)
    os.utime(path, (0, 0))  # the machine's clock is set, one way or the other
    steady[0] += 7 * DAY_S - 1
    assert partial.stale(7 * DAY_S, drop=False) == (0, 0)
    os.utime(path, (2**40, 2**40))
    steady[0] += 1
    assert partial.stale(7 * DAY_S, drop=False) == (1, 1)

    again = PartialUploads(tmp_path, clock=lambda: steady[0])  # the time of the file lies ahead
    assert again.stale(1, drop=False) == (0, 0)
    steady[0] += 7 * DAY_S
    assert again.stale(7 * DAY_S, drop=True) == (1, 1)
