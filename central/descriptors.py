"""Open files: each connection takes one, and so does each upload and each blob.

In: the process's limit, settings. Out: how many connections central takes. Guarantee: connections
leave enough descriptors for what they ask for, so central never runs out of them.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from contextlib import suppress
from pathlib import Path

from central.settings import LimitSettings

log = logging.getLogger(__name__)

RESERVE = 256
"""For journal, blobs, logs and gRPC's own."""
PER_CONNECTION = 2
"""The connection, and an upload on it that is under way."""
OPEN = Path("/proc/self/fd")
LOOK_S = 10.0
NEARLY = 0.9


def raise_limit() -> int:
    """Let this process open as many files as the system allows it; returns how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems refuse their own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return soft if soft != resource.RLIM_INFINITY else 1 << 20


def connections_that_fit(descriptors: int, limits: LimitSettings) -> int:
    """How many connections of nodes and operators a process with so many descriptors takes."""
    room = (descriptors - RESERVE - limits.enrollment_connections) // PER_CONNECTION
    return max(1, min(limits.connections, room))


def allowed_connections(limits: LimitSettings) -> int:
    """Raise the process's limit as far as it goes; log when too few connections fit."""
    descriptors = raise_limit()
    fit = connections_that_fit(descriptors, limits)
    if fit < limits.connections:
        log.warning(
            "fewer connections than CENTRAL_LIMITS__CONNECTIONS fit; raise the hard limit of open "
            "files (ulimit -Hn)",
            extra={"open_files": descriptors, "connections": fit, "wanted": limits.connections},
        )
    return fit


async def watch_connections(allowed: int) -> None:
    """Log once when central has nearly as many connections as it takes, and once when that is over.

    Runs until it is cancelled.
    """
    is_full = False
    while OPEN.is_dir():
        number = await asyncio.to_thread(_sockets)
        if is_full != (number >= NEARLY * allowed):
            is_full = not is_full
            said = (
                "nearly no new connection is taken"
                if is_full
                else "new connections are taken again"
            )
            log.warning(said, extra={"connections": number, "allowed": allowed})
        await asyncio.sleep(LOOK_S)


def _sockets() -> int:
    number = 0
    for path in OPEN.iterdir():
        with suppress(OSError):  # closed meanwhile
            number += str(path.readlink()).startswith("socket:")
    return number
