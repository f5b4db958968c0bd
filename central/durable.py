"""Files that survive a power cut: temporary name, fsync, rename, fsync of the directory.

In: bytes or a finished file. Out: the file under its final name, whole or not at all. An unusable disk is a
StorageError that names the path.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from central.errors import StorageError, StorageFull

TEMPORARY_SUFFIX = ".tmp"
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write says that there is no room for."""
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull(
                f"{path} cannot be written: {error.strerror}. Free space on its disk; `central retention --apply` lists and "
                "deletes what nothing needs."
            ) from error
        raise StorageError(
            f"{path} cannot be used: {error.strerror or error}. "
            "Expected a writable place with free space; check CENTRAL_DATA_DIR and its owner."
        ) from error


def make_directory(path: Path) -> None:
    """Create `path` and its parents, readable by the owner only; raises StorageError."""
    with storage(path):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Put `data` at `path`, readable by the owner only; raises StorageError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with storage(path):
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def publish(temporary: Path, path: Path) -> None:
    """Rename the finished and synced file `temporary` to `path` and sync the directory; raises StorageError."""
    with storage(path):
        temporary.replace(path)
        sync_directory(path.parent)


def publish_link(file: Path, path: Path) -> bool:
    """Give the finished and synced `file` the name `path` too, unless that is taken, and sync the directory.

    False, and nothing done, where the two lie on different file systems or on one without links. Raises StorageError.
    """
    with storage(path):
        try:
            path.hardlink_to(file)
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno in _NO_LINKS:
                return False
            raise
        sync_directory(path.parent)
        return True


def sync_file(path: Path) -> None:
    """Make what was written to `path` durable."""
    _sync(path, os.O_RDONLY)


def sync_directory(path: Path) -> None:
    """Make names in `path` durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def remove_temporary_files(directory: Path) -> int:
    """Remove what a killed process left under `directory`; returns how many files."""
    stale = list(directory.rglob(f"*{TEMPORARY_SUFFIX}"))
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
