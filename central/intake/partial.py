"""Updates that are not complete yet.

In: pieces of a payload, each with its offset. Out: a file on disk that a later call goes on with. Guarantees: a piece
is written only where the bytes on disk end, so two streams of one update can never mix; what `committed` counted is
synced; bytes are hashed as they come and never read again. Files lie at `<root>/<node id>/<update id>.part`.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import grpc

from central import faults
from central.durable import make_directory, storage, sync_directory, sync_file
from central.errors import Reason, Refused
from protos.manifest import CHUNK_BYTES

SUFFIX = ".part"
SYNC_BYTES = 8 << 20
"""A crash of the machine costs at most this much of an upload."""
LOCKS = 1024
"""Updates share locks; two of one lock only wait for each other."""


class PartialUploads:
    """One per central; every method blocks on disk."""

    def __init__(self, root: Path) -> None:
        """Create `root` when absent; raises StorageError."""
        self._root = root
        self._locks = [threading.RLock() for _ in range(LOCKS)]
        make_directory(root)

    def committed(self, node_id: str, update_id: str) -> int:
        """Bytes of the update that are durable."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            if not path.is_file():
                return 0
            sync_file(path)
            sync_directory(path.parent)
            return path.stat().st_size

    def open(self, node_id: str, update_id: str, offset: int) -> Incoming:
        """Go on with the update at `offset`; raises Refused when the bytes on disk end elsewhere. Close it again."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            if not path.parent.is_dir():
                make_directory(path.parent)
                sync_directory(self._root)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            file = FileIO(os.open(path, flags, 0o600), "a+")
        incoming = Incoming(path, update_id, file, self._lock(update_id))
        try:
            expect_offset(update_id, offset, incoming.size)
            incoming.read_digest()
        except BaseException:
            incoming.close()
            raise
        return incoming

    def discard(self, node_id: str, update_id: str) -> None:
        """Forget the bytes; idempotent."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            path.unlink(missing_ok=True)

    def stale(self, age_s: float, drop: bool) -> tuple[int, int]:
        """How many unfinished updates no node has touched for `age_s`, and their bytes; `drop` forgets them."""
        count = size_bytes = 0
        with storage(self._root):
            for path in self._root.glob(f"*/*{SUFFIX}"):
                with self._lock(path.stem), suppress(FileNotFoundError):  # it was admitted or discarded meanwhile
                    status = path.stat()
                    if time.time() - status.st_mtime < age_s:
                        continue
                    count, size_bytes = count + 1, size_bytes + status.st_size
                    if drop:
                        path.unlink()
        return count, size_bytes

    def held_bytes(self, node_id: str, besides: str) -> int:
        """Bytes of the node's unfinished updates other than `besides`."""
        total = 0
        with storage(self._root):
            for path in (self._root / node_id).glob(f"*{SUFFIX}"):
                if path.name != f"{besides}{SUFFIX}":
                    with suppress(FileNotFoundError):  # it was admitted or discarded meanwhile
                        total += path.stat().st_size
        return total

    def path(self, node_id: str, update_id: str) -> Path:
        """Where the update's bytes lie, if any."""
        return self._root / node_id / f"{update_id}{SUFFIX}"

    def _lock(self, update_id: str) -> threading.RLock:
        return self._locks[int(update_id[:8], 16) % LOCKS]


class Incoming:
    """One stream's hold of an unfinished update: it appends, and knows the digest of everything before.

    Its file stays open, so that a file that another stream put in the place of this one is told from it.
    """

    def __init__(self, path: Path, update_id: str, file: FileIO, lock: threading.RLock) -> None:
        self._path = path
        self.update_id = update_id
        self._file = file
        self._lock = lock
        self._digest = hashlib.sha256()
        self.size = os.fstat(file.fileno()).st_size
        """Bytes so far; only this stream's own count after the first write."""

    @property
    def path(self) -> Path:
        return self._path

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far."""
        return self._digest.hexdigest()

    def read_digest(self) -> None:
        """Take in the bytes of earlier attempts."""
        with storage(self._path):
            for begin in range(0, self.size, CHUNK_BYTES):
                self._digest.update(os.pread(self._file.fileno(), min(CHUNK_BYTES, self.size - begin), begin))

    def write(self, data: bytes) -> None:
        """Append; raises Refused when another stream of the same update has changed the file."""
        with self._lock, storage(self._path):
            self.expect_unchanged()
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
            if (self.size + len(data)) // SYNC_BYTES != self.size // SYNC_BYTES:
                os.fdatasync(self._file.fileno())
            self.size += len(data)
            faults.reach("intake.chunk_written")
        self._digest.update(data)  # frees the interpreter for other streams

    def expect_unchanged(self) -> None:
        """Raises Refused unless the update's file is this one with exactly the bytes that this stream knows."""
        own = os.fstat(self._file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        is_own = there is not None and (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)
        expect_offset(self.update_id, self.size, own.st_size if is_own else -1)

    def close(self) -> None:
        """Let go of the file; idempotent. Waits for a write of a cancelled call: its descriptor must not be reused."""
        with self._lock:
            self._file.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other stream changes the update's bytes."""
        with self._lock:
            yield


def expect_offset(update_id: str, offset: int, committed: int) -> None:
    """Raises Refused unless a transfer goes on exactly where the bytes on disk end."""
    if offset != committed:
        raise Refused(
            grpc.StatusCode.ABORTED,
            Reason.WRONG_OFFSET,
            f"Upload of update {update_id} goes on at byte {offset}, but central has "
            f"{'dropped it' if committed < 0 else committed}. "
            "Ask QueryUpload and go on from there.",
        )
