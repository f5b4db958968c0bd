"""Uploads that are not complete yet: one file each, to which pieces are appended.

In: pieces of a payload, in order. Out: a file on disk that a later call goes on with, and the
digest of what is in it. Guarantees: a piece is written only where the file ends, so two streams
of one update never mix; what `committed` counted is synced; a kill costs at most the piece that
was being written.

Files lie at `<root>/<node id>/<update id>.part`. Only this process changes them, so it knows
their sizes without asking the disk.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from central import faults
from central.disk import make_directory, storage
from central.errors import Reason, Refused
from lorikeet.clock import steady_s, wall_time
from lorikeet.durable import sync

log = logging.getLogger(__name__)

SUFFIX = ".part"
SYNC_BYTES = 8 << 20
"""A crash of the machine costs at most so much of an upload."""
READ_BYTES = 256 << 10
"""Bytes of an earlier stream are read again in pieces of this size."""


@dataclass
class _File:
    """One unfinished update; `size` and `gone` change under `lock` only."""

    path: Path
    size: int = 0
    gone: bool = False
    """Discarded: a stream that still holds it must not go on."""
    streams: int = 0
    """Streams that hold it; changes under the lock of all files."""
    touched_s: float = 0.0
    """When the last stream let go of it, by the clock of `Uploads`."""
    lock: threading.RLock = field(default_factory=threading.RLock)


class Uploads:
    """One per central; thread-safe. Every method but `held_bytes` and
    `unfinished` blocks on disk."""

    def __init__(
        self, root: Path, node_unfinished: int = 16, clock: Callable[[], float] = steady_s
    ) -> None:
        """Create `root` when absent; raises StorageError. Of one node `node_unfinished` are kept.

        `clock` counts seconds that nobody can set.
        """
        self._root = root
        self._clock = clock
        self._node_unfinished = node_unfinished
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, _File]] = {}
        """By node and update; those that were touched last are at the end."""
        make_directory(root)
        with storage(root):
            for path in sorted(root.glob(f"*/*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
                self._files.setdefault(path.parent.name, {})[path.stem] = self._found(path)

    def _found(self, path: Path) -> _File:
        """Take in what an earlier run of central left; a time that lies ahead counts as now."""
        found = path.stat()
        age_s = max(0.0, wall_time().timestamp() - found.st_mtime)
        return _File(path, found.st_size, touched_s=self._clock() - age_s)

    def committed(self, node_id: str, update_id: str) -> int:
        """Bytes of the update that are durable."""
        file = self._find(node_id, update_id)
        if file is None:
            return 0
        with file.lock, storage(file.path):
            if file.gone or not file.size:
                return 0
            with _all_or_nothing(file):
                sync(file.path)
                sync(file.path.parent)
            return file.size

    def open(self, node_id: str, update_id: str, offset: int) -> Upload:
        """Go on with the update at `offset`; close it again.

        Raises Refused (WRONG_OFFSET) when the bytes on disk end elsewhere.
        """
        path = self.path(node_id, update_id)
        with self._lock:
            own = self._files.setdefault(node_id, {})
            file = own.pop(update_id) if update_id in own else _File(path)
            own[update_id] = file
            file.streams += 1
        try:
            upload = self._hold(file, update_id, offset)
        except BaseException:
            self._let_go(file)
            raise
        self._drop_oldest(node_id)
        try:
            # The file's lock is free meanwhile: bytes that came earlier do not change.
            upload.read_again()
        except BaseException:
            upload.close()
            raise
        return upload

    def _hold(self, file: _File, update_id: str, offset: int) -> Upload:
        with file.lock, storage(file.path):
            _expect_end(file, update_id, offset)
            if not file.path.parent.is_dir():
                make_directory(file.path.parent)
                sync(self._root)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            return Upload(update_id, file, os.open(file.path, flags, 0o600), self._let_go)

    def _let_go(self, file: _File) -> None:
        """Note that a stream holds the file no longer; an upload without a byte leaves no file."""
        with self._lock:
            file.streams -= 1
            file.touched_s = self._clock()
            is_unused = not file.streams and not file.size
        if is_unused:
            self._drop(file)

    def _drop_oldest(self, node_id: str) -> None:
        """Forget what the node has not touched for longest, until it has as many as it may."""
        with self._lock:
            files = list(self._files.get(node_id, {}).values())
            spare = len(files) - self._node_unfinished
            oldest = [file for file in files if not file.streams][: max(0, spare)]
        for file in oldest:
            log.info(
                "unfinished upload dropped, its node has newer ones", extra={"path": str(file.path)}
            )
            self._drop(file)

    def discard(self, node_id: str, update_id: str) -> None:
        """Forget the bytes of the update; idempotent."""
        file = self._find(node_id, update_id)
        if file is not None:
            self._drop(file)

    def discard_own(self, upload: Upload) -> None:
        """Forget the bytes that this stream appends to, and no others.

        After an earlier discard another stream of the update may have begun afresh.
        """
        self._drop(upload.file)

    def discard_all(self, update_ids: Container[str]) -> None:
        """Forget the bytes of these updates, whoever sent them."""
        with self._lock:
            files = [
                (node_id, update_id) for node_id, own in self._files.items() for update_id in own
            ]
        for node_id, update_id in files:
            if update_id in update_ids:
                self.discard(node_id, update_id)

    def stale(self, age_s: float, drop: bool) -> tuple[int, int]:
        """How many unfinished updates no node has touched for `age_s`, and their bytes.

        `drop` forgets them.
        """
        with self._lock:
            files = [
                file for own in self._files.values() for file in own.values() if not file.streams
            ]
        count = size_bytes = 0
        for file in files:
            with file.lock:
                if not file.gone and self._clock() - file.touched_s >= age_s:
                    count, size_bytes = count + 1, size_bytes + file.size
                    if drop:
                        self._drop(file)
        return count, size_bytes

    def held_bytes(self, node_id: str, besides: str, admitted: Container[str]) -> int:
        """Bytes of the node's unfinished updates other than `besides`.

        Those of `admitted` are not counted: they are among the blobs, and counted there.
        """
        with self._lock:
            files = self._files.get(node_id, {})
            return sum(
                file.size
                for update_id, file in files.items()
                if update_id != besides and update_id not in admitted
            )

    def unfinished(self) -> tuple[int, int]:
        """How many there are of all nodes, and their bytes. Does not ask the disk."""
        with self._lock:
            sizes = [file.size for own in self._files.values() for file in own.values()]
        return len(sizes), sum(sizes)

    def path(self, node_id: str, update_id: str) -> Path:
        """Where the update's bytes lie, if any."""
        return self._root / node_id / f"{update_id}{SUFFIX}"

    def _find(self, node_id: str, update_id: str) -> _File | None:
        with self._lock:
            return self._files.get(node_id, {}).get(update_id)

    def _drop(self, file: _File) -> None:
        with file.lock, storage(file.path):
            if file.gone:  # what lies there now may be another stream's new file
                return
            file.path.unlink(missing_ok=True)
            file.gone = True
            with self._lock:
                own = self._files[file.path.parent.name]
                if own.get(file.path.stem) is file:
                    del own[file.path.stem]


class Upload:
    """One stream's hold of an unfinished update: it appends, and knows the digest of all bytes.

    Every method blocks on disk, and never two are called at once.
    """

    def __init__(
        self, update_id: str, file: _File, descriptor: int, let_go: Callable[[_File], None]
    ) -> None:
        self.update_id = update_id
        self.file = file
        self.size = file.size
        """Bytes in the file as far as this stream knows."""
        self._descriptor = descriptor
        self._let_go = let_go
        self._digest = hashlib.sha256()
        self._is_open = True

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes so far, also of those that earlier streams wrote."""
        return self._digest.hexdigest()

    def read_again(self) -> None:
        """Take the bytes of earlier streams into the digest; raises StorageError."""
        with storage(self.path):
            for begin in range(0, self.size, READ_BYTES):
                size = min(READ_BYTES, self.size - begin)
                self._digest.update(os.pread(self._descriptor, size, begin))

    def write(self, piece: bytes) -> None:
        """Append `piece`.

        Raises Refused when another stream changed the file, and StorageError. Then the file's size
        counts as before, and the next stream writes over what half a write left.
        """
        with self.file.lock, storage(self.path):
            _expect_end(self.file, self.update_id, self.size)
            end = self.size + len(piece)
            _write_all(self._descriptor, piece, self.size)
            if end // SYNC_BYTES != self.size // SYNC_BYTES:
                with _all_or_nothing(self.file):
                    os.fdatasync(self._descriptor)
            self.size = self.file.size = end
        self._digest.update(piece)
        faults.reach("intake.chunk_written")

    def sync(self) -> None:
        """Make every byte durable; raises StorageError. Then the update begins anew."""
        with self.file.lock, storage(self.path), _all_or_nothing(self.file):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        # A merge reads it again hours later. Memory that the kernel gets back at once is used for
        # the next upload, and pages that were used before are ten times cheaper to write to.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(self._descriptor)
        self._let_go(self.file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other stream changes the update's bytes."""
        with self.file.lock:
            yield


@contextmanager
def _all_or_nothing(file: _File) -> Iterator[None]:
    """After a failed sync no byte of the file counts, and all are written again.

    Linux says once that a write to the disk failed. Then it takes the bytes in memory for written,
    so a second sync proves nothing.
    """
    try:
        yield
    except OSError:
        file.size = 0
        raise


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count


def _expect_end(file: _File, update_id: str, offset: int) -> None:
    """Raises Refused unless a stream goes on exactly where the file ends."""
    if file.gone or offset != file.size:
        found = "dropped it" if file.gone else str(file.size)
        raise Refused(
            grpc.StatusCode.ABORTED,
            Reason.WRONG_OFFSET,
            f"Upload of update {update_id} goes on at byte {offset}, but central has {found}. "
            "Ask QueryUpload and go on from there.",
        )
