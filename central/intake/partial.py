"""Updates that are not complete yet.

In: pieces of a payload, in order. Out: a file on disk that a later call goes on with. Guarantees: a piece is written only
where the bytes on disk end, so two streams of one update can never mix; what `committed` counted is synced; bytes are
hashed and inspected as they come, and read again only when another stream goes on; a kill costs at most one window. Files
lie at `<root>/<node id>/<update id>.part`; only this process changes them, so what they hold is known without asking the
disk.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from central import faults
from central.clock import steady_s, wall_time
from central.durable import make_directory, storage, sync_directory, sync_file
from central.errors import Reason, Refused, StorageError
from central.intake.direct import WINDOW_BYTES, DirectFile, Windows

log = logging.getLogger(__name__)

Inspect = Callable[[memoryview], None]
"""Sees every byte of a payload once, in order; it must not keep what it is given."""
SUFFIX = ".part"
SYNC_BYTES = 8 << 20
"""A crash of the machine costs at most this much of an upload."""


@dataclass
class _File:
    """One unfinished update; `size` and `gone` change under `lock` only."""

    path: Path
    size: int = 0
    gone: bool = False
    """Discarded: a stream that still holds it must not go on."""
    streams: int = 0
    """Streams that hold it; under the lock of all files."""
    touched_s: float = 0.0
    """When the last of them let go of it, by the clock of `PartialUploads`."""
    lock: threading.RLock = field(default_factory=threading.RLock)


class PartialUploads:
    """One per central; thread-safe. Every method but `held_bytes` blocks on disk."""

    def __init__(self, root: Path, node_unfinished: int = 16, clock: Callable[[], float] = steady_s) -> None:
        """Create `root` when absent; raises StorageError. Of one node `node_unfinished` are kept.

        `clock` counts seconds that nobody can set.
        """
        self._root = root
        self._clock = clock
        self._node_unfinished = node_unfinished
        self._windows = Windows()
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, _File]] = {}
        """By node and update, those that were touched last at the end."""
        make_directory(root)
        with storage(root):
            for path in sorted(root.glob(f"*/*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
                self._files.setdefault(path.parent.name, {})[path.stem] = self._found(path)

    def _found(self, path: Path) -> _File:
        """What an earlier run of central left; a time that lies ahead counts as now."""
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
            sync_file(file.path)
            sync_directory(file.path.parent)
            return file.size

    def open(self, node_id: str, update_id: str, offset: int, inspect: Inspect) -> Incoming:
        """Go on with the update at `offset`; raises Refused when the bytes on disk end elsewhere. Close it again."""
        path = self.path(node_id, update_id)
        with self._lock:
            own = self._files.setdefault(node_id, {})
            file = own.pop(update_id) if update_id in own else _File(path)
            own[update_id] = file
            file.streams += 1
        try:
            incoming = self._hold(file, update_id, offset, inspect)
        except BaseException:
            self._let_go(file)
            raise
        self._drop_oldest(node_id)
        try:
            # Without the lock, which who answers all nodes may wait for: what came earlier does not change.
            incoming.read_again(offset)
        except BaseException:
            incoming.close()
            raise
        return incoming

    def _hold(self, file: _File, update_id: str, offset: int, inspect: Inspect) -> Incoming:
        with file.lock, storage(file.path):
            if file.gone:  # just now
                expect_offset(update_id, offset, -1)
            if not file.path.parent.is_dir():
                make_directory(file.path.parent)
                sync_directory(self._root)
            disk = DirectFile(file.path)
            file.size = disk.size()
            return Incoming(update_id, file, disk, self._windows, inspect, self._let_go)

    def _let_go(self, file: _File) -> None:
        """A stream holds the file no longer; one that nothing came of leaves none."""
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
            log.info("unfinished upload dropped, its node has newer ones", extra={"path": str(file.path)})
            self._drop(file)

    def discard(self, node_id: str, update_id: str) -> None:
        """Forget the bytes; idempotent. Also what is said of an update that is admitted: its bytes are among the blobs."""
        file = self._find(node_id, update_id)
        if file is not None:
            self._drop(file)

    def discard_own(self, incoming: Incoming) -> None:
        """Forget the bytes that this stream appends to, and no others: after an earlier discard another stream may have begun afresh."""
        self._drop(incoming.file)

    def discard_all(self, update_ids: Container[str]) -> None:
        """Forget the bytes of these updates, whoever sent them."""
        with self._lock:
            files = [(node_id, update_id) for node_id, own in self._files.items() for update_id in own]
        for node_id, update_id in files:
            if update_id in update_ids:
                self.discard(node_id, update_id)

    def stale(self, age_s: float, drop: bool) -> tuple[int, int]:
        """How many unfinished updates no node has touched for `age_s`, and their bytes; `drop` forgets them."""
        with self._lock:
            files = [file for own in self._files.values() for file in own.values() if not file.streams]
        count = size_bytes = 0
        for file in files:
            with file.lock:
                if not file.gone and self._clock() - file.touched_s >= age_s:
                    count, size_bytes = count + 1, size_bytes + file.size
                    if drop:
                        self._drop(file)
        return count, size_bytes

    def held_bytes(self, node_id: str, besides: str, admitted: Container[str]) -> int:
        """Bytes of the node's unfinished updates other than `besides`; those of `admitted` are among the blobs, too, and counted there."""
        with self._lock:
            files = self._files.get(node_id, {})
            return sum(
                file.size for update_id, file in files.items() if update_id != besides and update_id not in admitted
            )

    def path(self, node_id: str, update_id: str) -> Path:
        """Where the update's bytes lie, if any."""
        return self._root / node_id / f"{update_id}{SUFFIX}"

    def _find(self, node_id: str, update_id: str) -> _File | None:
        with self._lock:
            return self._files.get(node_id, {}).get(update_id)

    def _drop(self, file: _File) -> None:
        with file.lock, storage(file.path):
            if file.gone:  # just now, and what lies there may be another stream's new file
                return
            file.path.unlink(missing_ok=True)
            file.gone = True
            with self._lock:
                own = self._files[file.path.parent.name]
                if own.get(file.path.stem) is file:
                    del own[file.path.stem]


class Incoming:
    """One stream's hold of an unfinished update: it appends, and knows the digest of everything before.

    Bytes gather in a window, which goes to disk when it is full. `take` runs on the event loop, everything else off it, and
    never two calls at once. Where the bytes of earlier streams end within a window, `catch_up` comes before `take`.
    """

    def __init__(
        self,
        update_id: str,
        file: _File,
        disk: DirectFile,
        windows: Windows,
        inspect: Inspect,
        let_go: Callable[[_File], None],
    ) -> None:
        self.update_id = update_id
        self._let_go = let_go
        self.size = 0
        """Bytes so far, those in the window included."""
        self.file = file
        self._disk: DirectFile | None = disk
        self._windows = windows
        self._window: memoryview | None = None
        """Borrowed while there is something in it."""
        self._begin = 0
        """Where the window lies in the file: a multiple of its size, until the last one is written."""
        self._known = file.size
        """Bytes in the file as far as this stream knows."""
        self._inspect = inspect
        self._digest = hashlib.sha256()

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes that were written."""
        return self._digest.hexdigest()

    @property
    def is_full(self) -> bool:
        """The window has to be written before more can be taken."""
        return self.size - self._begin == WINDOW_BYTES

    @property
    def is_behind(self) -> bool:
        """Bytes of an earlier stream belong into the window, and are not there yet."""
        return self._window is None and self.size > self._begin

    def take(self, data: memoryview) -> memoryview:
        """Copy what there is room for; returns the rest."""
        assert not self.is_behind
        begin = self.size - self._begin
        count = min(len(data), WINDOW_BYTES - begin)
        self._borrow()[begin : begin + count] = data[:count]
        self.size += count
        return data[count:]

    def read_again(self, offset: int) -> None:
        """Take in the whole windows of earlier attempts; raises Refused when their bytes do not end at `offset`."""
        expect_offset(self.update_id, offset, self._known)
        while self._known - self._begin >= WINDOW_BYTES:
            self.size += WINDOW_BYTES
            self.catch_up()
            self._count()
        self.size = self._known  # what is left takes a window, which waits for its turn

    def catch_up(self) -> None:
        """Take in the bytes of earlier attempts that are less than a window; idempotent."""
        if self.is_behind:
            assert self._disk is not None
            with storage(self.path):
                self._disk.read(self._borrow(), self._begin, self.size - self._begin)

    def write(self) -> None:
        """Write the window and begin the next one; raises Refused when another stream of the same update changed the file."""
        self.catch_up()
        with self.file.lock, storage(self.path):
            self._store()
            self._count()
        faults.reach("intake.chunk_written")

    def save(self) -> None:
        """Write what the window has so far, so that a later stream goes on from there; the same errors as `write`."""
        with self.file.lock, storage(self.path):
            self._store()

    def close(self) -> None:
        """Save what can be, and let go of the file; idempotent. Waits for a write of a cancelled call."""
        with self.file.lock:
            if self._disk is None:
                return
            try:
                with suppress(Refused):  # another stream's bytes are there, or nobody wants them any more
                    self.save()
            except StorageError:
                log.exception("part of an upload was not kept", extra={"update_id": self.update_id})
            finally:
                self._disk.close()
                self._disk = None
                self._give_back()
        self._let_go(self.file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block no other stream changes the update's bytes."""
        with self.file.lock:
            yield

    def _store(self) -> None:
        """Bring the file to `size`: the window is written whole, also what an earlier stream had written of it."""
        expect_offset(self.update_id, self._known, -1 if self.file.gone else self.file.size)
        # What is complete may be a blob already, and is never written again; less is known where it was not all read again.
        if self.size <= self._known:
            return
        assert self._disk is not None
        self._disk.write(self._borrow()[: self.size - self._begin], self._begin)
        if self.size // SYNC_BYTES != self._known // SYNC_BYTES:
            self._disk.sync()
        self._known = self.file.size = self.size

    def _count(self) -> None:
        if self._window is not None:
            window = self._window[: self.size - self._begin]
            self._digest.update(window)  # frees the interpreter for other streams
            self._inspect(window)
            self._begin = self.size
            self._give_back()

    def _borrow(self) -> memoryview:
        if self._window is None:
            with storage(self.path):
                self._window = self._windows.borrow()
        return self._window

    def _give_back(self) -> None:
        if self._window is not None:
            self._windows.give_back(self._window)
            self._window = None


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
