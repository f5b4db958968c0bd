"""Updates that are not complete yet.

In: pieces of a payload, each with its offset. Out: a file on disk that a later call goes on with. Guarantees: a piece
is written only where the bytes on disk end, so two streams of one update can never mix; what `committed` counted is
synced. Files lie at `<root>/<node id>/<update id>.part`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc

from central.durable import make_directory, storage, sync_directory, sync_file
from central.errors import Reason, Refused

SUFFIX = ".part"
SYNC_BYTES = 8 << 20
"""A crash of the machine costs at most this much of an upload."""
LOCKS = 64
"""Updates share locks; two of one lock only wait for each other."""
STALE_S = 7 * 24 * 3600.0


class PartialUploads:
    """One per central; every method blocks on disk."""

    def __init__(self, root: Path) -> None:
        """Create `root` when absent and drop what no node has touched for a week; raises StorageError."""
        self._root = root
        self._locks = [threading.RLock() for _ in range(LOCKS)]
        make_directory(root)
        with storage(root):
            for path in root.glob(f"*/*{SUFFIX}"):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink(missing_ok=True)

    def committed(self, node_id: str, update_id: str) -> int:
        """Bytes of the update that are durable."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            if not path.is_file():
                return 0
            sync_file(path)
            return path.stat().st_size

    def write(self, node_id: str, update_id: str, offset: int, data: bytes) -> None:
        """Append `data`, which begins at `offset` of the payload; raises Refused when the bytes on disk end elsewhere."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            if not path.parent.is_dir():
                make_directory(path.parent)
                sync_directory(self._root)
            is_new = not path.is_file()
            size = 0 if is_new else path.stat().st_size
            expect_offset(update_id, offset, size)
            with path.open("ab") as stream:
                stream.write(data)
            if is_new:
                sync_directory(path.parent)
            if (size + len(data)) // SYNC_BYTES != size // SYNC_BYTES:
                sync_file(path)

    def discard(self, node_id: str, update_id: str) -> None:
        """Forget the bytes; idempotent."""
        path = self.path(node_id, update_id)
        with self._lock(update_id), storage(path):
            path.unlink(missing_ok=True)

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

    @contextmanager
    def held(self, update_id: str) -> Iterator[None]:
        """Inside the block no other thread changes the update's bytes, so that what was checked is what is kept."""
        with self._lock(update_id):
            yield

    def _lock(self, update_id: str) -> threading.RLock:
        return self._locks[int(update_id[:8], 16) % LOCKS]


def expect_offset(update_id: str, offset: int, committed: int) -> None:
    """Raises Refused unless a transfer goes on exactly where the bytes on disk end."""
    if offset != committed:
        raise Refused(
            grpc.StatusCode.ABORTED,
            Reason.WRONG_OFFSET,
            f"Upload of update {update_id} goes on at byte {offset}, but central has {committed}. "
            "Ask QueryUpload and go on from there.",
        )
