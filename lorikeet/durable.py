"""Files that survive a power cut: temporary name, fsync, rename, fsync of the directory.

In: bytes or a finished file. Out: the file under its final name, whole or not at all.
Guarantees: what returned is on the disk. Every function raises OSError when the disk refuses.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Put `data` at `path` in place of what was there; `mode` is for a new file."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(temporary, flags, mode), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename the finished and synced `temporary` to `path` and sync the directory."""
    temporary.replace(path)
    sync(path.parent)


def publish_link(file: Path, path: Path) -> bool:
    """Give the finished and synced `file` the name `path` too, and sync the directory.

    A `path` that exists already stays as it is. False, and nothing done, where the two lie on
    different file systems or on one without links.
    """
    try:
        path.hardlink_to(file)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    sync(path.parent)
    return True


def sync(path: Path) -> None:
    """Make durable what was written to a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporary_files(directory: Path) -> None:
    """Remove what killed processes left anywhere under `directory`."""
    for path in list(directory.rglob(f"*{TEMPORARY_SUFFIX}")):
        path.unlink(missing_ok=True)
