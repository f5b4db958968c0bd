"""A little room of last resort: one small file whose blocks are allocated.

In: a directory. Out: its ballast, or the room of it. Whoever starts on a disk that something else
has filled to the last byte gives the ballast back first, and has that much room to start in.
"""

from __future__ import annotations

import os
from pathlib import Path

BALLAST = "room.ballast"
BALLAST_BYTES = 8 << 20
BALLAST_SHARE = 40
"""The ballast is a fortieth of the disk, at most BALLAST_BYTES, and at most half of what is free.
"""
LEAST_BALLAST_BYTES = 64 << 10


def give_back(place: Path) -> None:
    """Idempotent; raises OSError."""
    (place / BALLAST).unlink(missing_ok=True)


def take(place: Path, *, total: int, free: int) -> None:
    """Keep as much as there is; idempotent; raises OSError. total, free: of the disk, bytes."""
    path = place / BALLAST
    size = min(BALLAST_BYTES, total // BALLAST_SHARE, free // 2)
    if path.exists() or size < LEAST_BALLAST_BYTES:
        return
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
