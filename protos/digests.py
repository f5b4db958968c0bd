"""SHA-256 of files, remembered so that an unchanged file is not read again.

In: files, and a memory file in the program's own data directory. Out: hex digests. Guarantees: a
digest is taken from the memory only for a file of the same path, device, inode, size, modification
and change time; one that was touched within SETTLED_S of being hashed is not remembered, because a
second change may leave the same times. A memory that cannot be read or written, or that others may
write, only costs time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SETTLED_S = 2.0
"""Longer than the clock of any file system ticks."""

Entry = tuple[list[int], str]
"""Device, inode, size, modification and change time (ns), and the digest."""


class Digests:
    """The memory in `file`; None remembers nothing. `clock`: seconds since the epoch."""

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._clock = clock
        self._known = _read(file)
        self._new: dict[str, Entry] = {}

    def of(self, path: Path) -> str:
        """SHA-256 of the file at `path`, 64 hex digits; raises OSError."""
        key = str(path.resolve())
        with path.open("rb") as stream:
            before = _stamp(os.fstat(stream.fileno()))
            times, digest = self._known.get(key, (None, ""))
            if times == before:
                return digest
            started_s = self._clock()
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if (
                _stamp(os.fstat(stream.fileno())) == before
                and max(before[-2:]) < (started_s - SETTLED_S) * 1e9
            ):
                self._new[key] = (before, digest)
        return digest

    def save(self) -> None:
        """Write what was learnt.

        Whoever writes at the same time may win, and the other hashes again.
        """
        if self._file is None or not self._new:
            return
        entries = {
            key: entry
            for key, entry in (_read(self._file) | self._new).items()
            if Path(key).exists()
        }
        with (
            suppress(OSError),
            tempfile.TemporaryDirectory(dir=self._file.parent, prefix=".digests-") as folder,
        ):
            fresh = Path(folder) / self._file.name
            fresh.touch(mode=0o600)
            fresh.write_text(json.dumps(entries))
            fresh.replace(self._file)


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read(file: Path | None) -> dict[str, Entry]:
    if file is None:
        return {}
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return {}
            document = json.load(stream)
        return {key: (list(times), str(digest)) for key, (times, digest) in document.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
