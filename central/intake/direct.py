"""Files that are written past the page cache, and the buffers that this needs.

In: windows of a payload, aligned in memory. Out: bytes on disk that took no memory of the kernel's. What comes in is read
again by a merge, hours later, so a copy in the page cache helps nobody; making one costs more processor time than
everything else that storing does (benchmarks/README.md). Where a file system cannot do it (tmpfs), and for the last bytes
of a file, which are less than a block, the page cache is used as always.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

from protos.manifest import CHUNK_BYTES

BLOCK_BYTES = 4096
"""Offsets, lengths and addresses must be multiples of it; disks ask for 512 or this."""
WINDOW_BYTES = 4 * CHUNK_BYTES
"""A kill of central costs at most this much of an upload, half a chunk of the largest that updates.proto allows."""
KEPT_WINDOWS = 32
"""So many unused windows stay allocated: 16 MiB."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class Windows:
    """Page-aligned buffers of `WINDOW_BYTES`, used again and again; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unused: list[memoryview] = []

    def borrow(self) -> memoryview:
        """A buffer; what is in it is left from its last use."""
        with self._lock:
            if self._unused:
                return self._unused.pop()
        return memoryview(mmap.mmap(-1, WINDOW_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def give_back(self, window: memoryview) -> None:
        """Its borrower uses it no longer."""
        with self._lock:
            if len(self._unused) < KEPT_WINDOWS:
                self._unused.append(window)


class DirectFile:
    """One open file; not thread-safe. Every method raises OSError."""

    def __init__(self, path: Path) -> None:
        """Open `path` for reading and writing, made when absent, for its owner only."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o600)
            self._is_direct = bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o600)
            self._is_direct = False

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, window: memoryview, offset: int, size: int) -> None:
        """Read `size` bytes at `offset`, a multiple of a block, into `window`, which has room for whole blocks."""
        blocks = window[: -(-size // BLOCK_BYTES) * BLOCK_BYTES]
        try:
            count = os.preadv(self._descriptor, [blocks], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._is_direct:
                raise
            self._use_cache()  # this disk's blocks are larger
            count = os.preadv(self._descriptor, [blocks], offset)
        if count < size:
            raise OSError(errno.EIO, f"fewer than {size} bytes at {offset}")

    def write(self, window: memoryview, offset: int) -> None:
        """Write `window`, which begins at a block's boundary in memory and in the file. Only the file's end may lie within a block."""
        whole = len(window) // BLOCK_BYTES * BLOCK_BYTES if self._is_direct else 0
        try:
            self._write(window[:whole], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this disk's blocks are larger
                raise
            whole = 0
        if whole < len(window):
            self._use_cache()
            self._write(window[whole:], offset + whole)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, offset)
            data, offset = data[count:], offset + count

    def _use_cache(self) -> None:
        if self._is_direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_DIRECT)
            self._is_direct = False
