"""Updates that are not complete yet.

In: pieces of a payload, each with its offset. Out: a file on disk that a later call goes on with. Guarantees: a piece
is written only where the bytes on disk end, so two streams of one update can never mix; what `committed` counted is
synced; bytes are hashed as they come, and read again only when another stream goes on. Files lie at
`<root>/<node id>/<update id>.part`; only this process changes them, so what they hold is known without asking the disk.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from central import faults
from central.durable import make_directory, storage, sync_directory, sync_file
from central.errors import Reason, Refused
from protos.manifest import CHUNK_BYTES

SUFFIX = ".part"
SYNC_BYTES = 8 << 20
"""A crash of the machine costs at most this much of an upload."""


@dataclass
class _File:
    """One unfinished update; `size` and `gone` change under `lock` only."""

    path: Path
    size: int = 0
    gone: bool = False
    """Discarded, or complete and kept elsewhere: a stream that still holds it must not go on."""
    lock: threading.RLock = field(default_factory=threading.RLock)


class PartialUploads:
    """One per central; thread-safe. Every method but `held_bytes` blocks on disk."""

    def __init__(self, root: Path) -> None:
        """Create `root` when absent; raises StorageError."""
        self._root = root
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, _File]] = {}
        """By node and update."""
        make_directory(root)
        with storage(root):
            for path in root.glob(f"*/*{SUFFIX}"):
                self._files.setdefault(path.parent.name, {})[path.stem] = _File(path, path.stat().st_size)

    def committed(self, node_id: str, update_id: str) -> int:
        """Bytes of the update that are durable."""
        file = self._find(node_id, update_id)
        if file is None:
            return 0
        with file.lock, storage(file.path):
            if file.gone or not file.size:
                return 0
            sync_file(file.path)
            sync_directory(file.path.parent)
            return file.size

    def open(self, node_id: str, update_id: str, offset: int) -> Incoming:
        """Go on with the update at `offset`; raises Refused when the bytes on disk end elsewhere. Close it again."""
        path = self.path(node_id, update_id)
        with self._lock:
            file = self._files.setdefault(node_id, {}).setdefault(update_id, _File(path))
        with file.lock, storage(path):
            if file.gone:  # just now
                expect_offset(update_id, offset, -1)
            if not path.parent.is_dir():
                make_directory(path.parent)
                sync_directory(self._root)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            file.size = os.fstat(descriptor).st_size
            incoming = Incoming(update_id, file, descriptor)
            try:
                expect_offset(update_id, offset, file.size)
                incoming.read_digest()
            except BaseException:
                incoming.close()
                raise
        return incoming

    def discard(self, node_id: str, update_id: str) -> None:
        """Forget the bytes; idempotent. Also what is said of an update whose file went among the blobs."""
        file = self._find(node_id, update_id)
        if file is not None:
            with file.lock, storage(file.path):
                file.path.unlink(missing_ok=True)
                file.gone = True
                with self._lock:
                    if self._files[node_id].get(update_id) is file:
                        del self._files[node_id][update_id]

    def stale(self, age_s: float, drop: bool) -> tuple[int, int]:
        """How many unfinished updates no node has touched for `age_s`, and their bytes; `drop` forgets them."""
        with self._lock:
            files = [
                (node_id, update_id, file) for node_id, own in self._files.items() for update_id, file in own.items()
            ]
        count = size_bytes = 0
        for node_id, update_id, file in files:
            with file.lock, storage(file.path), suppress(FileNotFoundError):  # admitted or discarded meanwhile
                if time.time() - file.path.stat().st_mtime >= age_s:
                    count, size_bytes = count + 1, size_bytes + file.size
                    if drop:
                        self.discard(node_id, update_id)
        return count, size_bytes

    def held_bytes(self, node_id: str, besides: str) -> int:
        """Bytes of the node's unfinished updates other than `besides`."""
        with self._lock:
            files = self._files.get(node_id, {})
            return sum(file.size for update_id, file in files.items() if update_id != besides)

    def path(self, node_id: str, update_id: str) -> Path:
        """Where the update's bytes lie, if any."""
        return self._root / node_id / f"{update_id}{SUFFIX}"

    def _find(self, node_id: str, update_id: str) -> _File | None:
        with self._lock:
            return self._files.get(node_id, {}).get(update_id)


class Incoming:
    """One stream's hold of an unfinished update: it appends, and knows the digest of everything before."""

    def __init__(self, update_id: str, file: _File, descriptor: int) -> None:
        self.update_id = update_id
        self._file = file
        self._descriptor = descriptor
        self._digest = hashlib.sha256()
        self.size = file.size
        """Bytes so far; only this stream's own count after the first write."""

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far."""
        return self._digest.hexdigest()

    def read_digest(self) -> None:
        """Take in the bytes of earlier attempts."""
        with storage(self.path):
            for begin in range(0, self.size, CHUNK_BYTES):
                self._digest.update(os.pread(self._descriptor, min(CHUNK_BYTES, self.size - begin), begin))

    def write(self, data: bytes) -> None:
        """Append; raises Refused when another stream of the same update has changed the file."""
        with self._file.lock, storage(self.path):
            self.expect_unchanged()
            view = memoryview(data)
            while view:
                written = os.write(self._descriptor, view)
                self._file.size += written  # also of a write that the next one fails after: the bytes are there
                view = view[written:]
            if (self.size + len(data)) // SYNC_BYTES != self.size // SYNC_BYTES:
                os.fdatasync(self._descriptor)
            self.size += len(data)
            faults.reach("intake.chunk_written")
        self._digest.update(data)  # frees the interpreter for other streams

    def expect_unchanged(self) -> None:
        """Raises Refused unless the update's file has exactly the bytes that this stream knows."""
        expect_offset(self.update_id, self.size, -1 if self._file.gone else self._file.size)

    def close(self) -> None:
        """Let go of the file; idempotent. Waits for a write of a cancelled call: its descriptor must not be reused."""
        with self._file.lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other stream changes the update's bytes."""
        with self._file.lock:
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
