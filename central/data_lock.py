"""One central per data directory.

In: the directory. Out: nothing. Guarantee: while the context is held, another process that wants it gets StorageError; a killed
holder holds nothing.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from central.durable import make_directory, storage
from central.errors import StorageError


class DataLock:
    """Held while central runs, and while a restore fills the directory."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "central.lock"
        self._descriptor = -1

    def __enter__(self) -> DataLock:
        make_directory(self._path.parent)
        with storage(self._path):
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._descriptor)
                raise StorageError(
                    f"Another central runs on {self._path.parent}. Stop it first, or set CENTRAL_DATA_DIR to another place."
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
