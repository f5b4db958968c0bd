"""Turns: so many uploads fill a window at the same time, and the others wait with one piece of their payload each.

In: uploads that have bytes. Out: leave to gather them. Guarantees: first come, first served; memory does not grow with the number
of uploads that keep pace, also when the disk or the blob store does not; an upload whose bytes come slowly gives its turn up after `LIMIT_S` and
goes on without, so it delays the next one by at most that much per window. Links that are all slow get `COUNT` turns in every `LIMIT_S`,
168 MB/s of windows, about what one central takes in.
"""

from __future__ import annotations

import asyncio

COUNT = 32
"""Windows that fill or wait for the disk, 16 MiB: several for each thread that writes."""
LIMIT_S = 0.1
"""For filling a window. Shorter, and turns of uploads that keep pace expire too (benchmarks/README.md); longer, and slow links are throttled."""


class Turn:
    """One upload's turns, one after the other; `free` has `COUNT` for all uploads together, on their event loop."""

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free = free
        self._has_begun = False
        self._expiry: asyncio.TimerHandle | None = None
        """Set while the turn counts."""

    async def begin(self) -> None:
        """Wait for a turn; returns at once within one, also when it has expired."""
        if not self._has_begun:
            await self._free.acquire()
            self._has_begun = True
            self._expiry = asyncio.get_running_loop().call_later(LIMIT_S, self._give_up)

    def keep(self) -> None:
        """The window is full: it waits for central now, and the turn lasts until it is written."""
        if self._expiry is not None:
            self._expiry.cancel()

    def end(self) -> None:
        """The window is written, or nobody wants it any more; idempotent."""
        self._has_begun = False
        self._give_up()

    def _give_up(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
            self._free.release()
