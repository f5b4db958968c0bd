"""Free space on the disks that central writes on, and what is kept of it.

In: the directories that central writes to. Out: a refusal while less than the reserve is free, and
a little room of last resort. Guarantees: uploads never take the reserve, which stays for merges,
verdicts and orders; on a disk that something else has filled to the last byte, central starts and
retention records what it deletes, in the room of the ballast.

The ballast is one small file per disk whose blocks are allocated. It is removed when central starts
and when retention finds the disk full, and made again as soon as there is room.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from central import faults
from central.disk import storage
from central.errors import Reason, Refused, SettingsError
from central.journal import utc_now
from lorikeet.ballast import BALLAST, give_back, take

log = logging.getLogger(__name__)

MAX_RESERVE_BYTES = 1 << 30
RESERVE_SHARE = 20
"""The default reserve: a twentieth of the disk, at most MAX_RESERVE_BYTES."""
LEAST_FILES = 100
"""Free inodes below which uploads are refused."""
NEXT_STEP = "Run `central retention --apply`, remove other files there, or give it a larger disk."


@dataclass(frozen=True)
class Disk:
    """One file system; bytes. `free_files` is None where it does not count files."""

    total: int
    free: int
    free_files: int | None


def measure(place: Path) -> Disk:
    """The file system of `place`; raises OSError."""
    found = os.statvfs(place)
    return Disk(
        found.f_blocks * found.f_frsize,
        found.f_bavail * found.f_frsize,
        found.f_favail if found.f_files else None,
    )


class Space:
    """One per central; thread-safe. `places` exist, one on each disk."""

    def __init__(
        self,
        places: Sequence[Path],
        reserve_bytes: int | None = None,
        disk: Callable[[Path], Disk] = measure,
    ) -> None:
        """`reserve_bytes` is CENTRAL_LIMITS__RESERVE_BYTES; None: the default for each disk."""
        self._places = places
        self._reserve_bytes = reserve_bytes
        self._disk = disk
        self._lock = threading.Lock()
        self._since = ""
        """RFC 3339 UTC; empty while there is room."""

    def expect_possible(self) -> None:
        """Raises SettingsError for a reserve larger than a disk, StorageError for a lost disk."""
        for place in self._places:
            with storage(place):
                total = self._disk(place).total
            if (self._reserve_bytes or 0) >= total:
                raise SettingsError(
                    f"CENTRAL_LIMITS__RESERVE_BYTES is {self._reserve_bytes}; the disk of {place} "
                    f"has {total} bytes, so every upload would be refused for ever. Set it lower, "
                    "or unset it for a twentieth of the disk."
                )

    def expect(self, size_bytes: int) -> None:
        """Raises Refused (STORAGE_FULL) when `size_bytes` more would cut into the reserve."""
        if text := self._lacking(size_bytes):
            self._note(True)
            raise storage_full(f"Central takes no uploads at the moment: {text}")

    def shortage(self) -> str:
        """Why no upload is taken, since when, and what to do; empty while uploads are taken."""
        text = self._lacking(0)
        since = self._note(bool(text))
        return f"{text} (since {since}). {NEXT_STEP}" if text else ""

    def disks(self) -> dict[Path, Disk]:
        """Every disk that central writes on, by a directory on it; raises OSError."""
        return {place: self._disk(place) for place in self._places}

    def release_ballast(self) -> None:
        """Give back the room of last resort; idempotent, never raises."""
        for place in self._places:
            try:
                give_back(place)
            except OSError:
                log.exception("ballast not removed", extra={"path": str(place / BALLAST)})
        faults.reach("space.ballast_released")

    def take_ballast(self) -> None:
        """Keep the room of last resort, as much as there is; idempotent, never raises."""
        for place in self._places:
            try:
                disk = self._disk(place)
                take(place, total=disk.total, free=disk.free)
            except OSError:
                log.warning("no room for the ballast", extra={"path": str(place / BALLAST)})

    def _note(self, is_short: bool) -> str:
        """Since when a disk has been short of room."""
        with self._lock:
            self._since = (self._since or f"{utc_now()[:19]}Z") if is_short else ""
            return self._since

    def _lacking(self, size_bytes: int) -> str:
        for place in self._places:
            with storage(place):
                disk = self._disk(place)
            reserve = self._reserve_bytes
            if reserve is None:
                reserve = min(MAX_RESERVE_BYTES, disk.total // RESERVE_SHARE)
            if disk.free < reserve + size_bytes:
                more = f" and {size_bytes} are to come" if size_bytes else ""
                return (
                    f"{disk.free} bytes are free on the disk of {place}{more}; expected {reserve} "
                    "to stay free (CENTRAL_LIMITS__RESERVE_BYTES)"
                )
            if disk.free_files is not None and disk.free_files < LEAST_FILES:
                return (
                    f"{disk.free_files} files can still be made on the disk of {place}; expected "
                    f"{LEAST_FILES}"
                )
        return ""


def storage_full(text: str) -> Refused:
    """The answer to a node whose bytes find no room: nothing is wrong with them."""
    return Refused(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.STORAGE_FULL,
        f"{text.rstrip('.')}. Try again later; central's operator has to make room.",
    )
