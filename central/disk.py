"""Central's words for a disk that cannot be used.

In: a block that reads or writes. Out: an unusable disk is a StorageError that names the path.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from central.errors import StorageError, StorageFull
from lorikeet import durable

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                f"{path} cannot be written: {error.strerror}. Free space on its disk; "
                "`central retention --apply` lists and deletes what nothing needs."
            ) from error
        raise StorageError(
            f"{path} cannot be used: {error.strerror or error}. Expected a writable place with "
            "free space; check CENTRAL_DATA_DIR and its owner."
        ) from error


def make_directory(path: Path) -> None:
    """Create `path` and its parents, readable by the owner only; raises StorageError."""
    with storage(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` durably, readable by the owner only; raises StorageError."""
    with storage(path):
        durable.write_file(path, data)
