"""A lock on a file: one process at a time.

In: a path, and what to say to the second. Out: nothing. Guarantee: while the context is held, another process that wants the lock
gets StorageError; a killed holder holds nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from central.durable import make_directory, storage
from central.errors import StorageError


class FileLock:
    """A context; not re-entrant."""

    def __init__(self, path: Path, taken: str) -> None:
        self._path = path
        self._taken = taken
        self._descriptor = -1

    def __enter__(self) -> FileLock:
        make_directory(self._path.parent)
        with storage(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise StorageError(self._taken) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


class DataLock(FileLock):
    """One central per data directory: held while central runs, and while a restore fills the directory."""

    NAME = "central.lock"

    def __init__(self, data_dir: Path) -> None:
        taken = f"Another central runs on {data_dir}. Stop it first, or set CENTRAL_DATA_DIR to another place."
        super().__init__(data_dir / self.NAME, taken)
