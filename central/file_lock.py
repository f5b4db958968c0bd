"""Central's locks on files: one process at a time.

In: a path, and what to say to the second. Out: nothing. Guarantee: while the context is held,
another process that wants the lock gets StorageError; a killed holder holds nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from central.disk import make_directory, storage
from central.errors import StorageError
from lorikeet.locks import locked


class FileLock:
    """A context; not re-entrant."""

    def __init__(self, path: Path, taken: str) -> None:
        self._path = path
        self._taken = taken
        self._held = ExitStack()

    def __enter__(self) -> FileLock:
        make_directory(self._path.parent)
        with storage(self._path):
            try:
                self._held.enter_context(locked(self._path))
            except BlockingIOError:
                raise StorageError(self._taken) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


class DataLock(FileLock):
    """One central per data directory: held while central runs, and while a restore fills it."""

    NAME = "central.lock"

    def __init__(self, data_dir: Path) -> None:
        taken = (
            f"Another central runs on {data_dir}. Stop it first, or set CENTRAL_DATA_DIR to "
            "another place."
        )
        super().__init__(data_dir / self.NAME, taken)
