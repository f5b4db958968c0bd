"""TCP ports for servers that a script or a test starts on this machine.

In: how many are wanted. Out: ports on 127.0.0.1 that nobody listens on.
Guarantees: another process that asks here gets other ports while this process lives. The kernel
does not give one of them to an outgoing connection before the server listens.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOWEST = 10_000
BLOCK = 250
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_lock = threading.Lock()
_held: list[IO[bytes]] = []
"""The locks of this process's blocks; the kernel takes them back when it ends."""
_ports: Iterator[int] = iter(())


def free_port() -> int:
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Distinct ports, each of them another than those given before."""
    found: list[int] = []
    with _lock:
        while len(found) < count:
            port = _next()
            if _is_free(port):
                found.append(port)
    return found


def _next() -> int:
    global _ports
    port = next(_ports, None)
    if port is None:
        _ports = iter(_take_block())
        port = next(_ports)
    return port


def _take_block() -> range:
    """A block of ports that no other process holds."""
    folder = Path(tempfile.gettempdir()) / f"lorikeet-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for first in range(LOWEST, _lowest_ephemeral() - BLOCK, BLOCK):
        file = (folder / str(first)).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)
        return range(first, first + BLOCK)
    raise RuntimeError(
        f"Every block of {BLOCK} ports is held by a running process (locks in {folder}). "
        "Stop tests or demos that still run."
    )


def _lowest_ephemeral() -> int:
    """Ports from here on go to outgoing connections."""
    try:
        return int(EPHEMERAL.read_text().split()[0])
    except OSError:  # not Linux
        return 32_768


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
