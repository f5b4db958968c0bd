"""A lock on a file: one process at a time.

In: a path. Out: nothing. Guarantee: while the context is held, another process that wants the
lock gets BlockingIOError; a killed holder holds nothing.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock on `path`, which is made when it is absent.

    Raises:
        BlockingIOError: another holder has it. The caller knows its name and says it.
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
