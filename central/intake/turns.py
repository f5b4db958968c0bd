"""Turns: so many uploads fill a window at the same time, and the others wait with what little gRPC holds of them.

In: uploads that have bytes. Out: leave to gather them. Guarantees: first come, first served; memory does not grow with the number
of uploads that keep pace; one that is slow gives its turn up after `LIMIT_S` and goes on without, so it holds up nobody for longer.
"""

from __future__ import annotations

import asyncio

COUNT = 32
"""Windows that fill or are written: 16 MiB. Eight threads write, and the disk never waits for bytes."""
LIMIT_S = 1.0
"""A window fills in 0.1 to 0.2 s where 200 uploads share two cores (benchmarks/README.md)."""


class Turns:
    """One per central; used on its event loop."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(COUNT)


class Turn:
    """One upload's turns, one after the other."""

    def __init__(self, turns: Turns) -> None:
        self._free = turns.free
        self._has_begun = False
        self._expiry: asyncio.TimerHandle | None = None
        """Set while the turn counts."""

    async def begin(self) -> None:
        """Wait for a turn; returns at once within one, also when it has expired."""
        if not self._has_begun:
            await self._free.acquire()
            self._has_begun = True
            self._expiry = asyncio.get_running_loop().call_later(LIMIT_S, self._give_up)

    def end(self) -> None:
        """The window is written, or nobody wants it any more; idempotent."""
        self._has_begun = False
        self._give_up()

    def _give_up(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
            self._free.release()
