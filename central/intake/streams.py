"""The upload streams that are open: of one update only the newest call counts.

In: uploads and questions about uploads. Out: the end of an older stream of the same update, before the newer call goes on.
A connection may be cut and central not know it yet; what the old stream holds in memory must be on disk before its node
hears how much central has. Guarantee: when `take_over` returns, no other stream of the update is open. Used on the event
loop alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from central.errors import Reason, Refused

Key = tuple[str, str]
"""Node id and update id."""


class Stream:
    """One open upload. Its handler waits for the next piece within `patience`, which ends early when it is taken over."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._patience: asyncio.Timeout | None = None
        self.is_taken_over = False
        self.ended = asyncio.Event()

    def waits(self, patience: asyncio.Timeout) -> None:
        """The handler waits for the next piece from now on."""
        self._patience = patience
        now = asyncio.get_running_loop().time()
        patience.reschedule(now if self.is_taken_over else now + self._idle_s)

    def works(self, patience: asyncio.Timeout) -> None:
        """The handler has a piece, or all of them: the time from now on is central's."""
        self._patience = None
        patience.reschedule(None)

    def take_over(self) -> None:
        """Let the handler end as soon as it has dealt with the piece that it has."""
        if not self.is_taken_over:
            self.is_taken_over = True
            if self._patience is not None:
                self.waits(self._patience)


class OpenUploads:
    """One per central."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._open: dict[Key, Stream] = {}

    async def take_over(self, node_id: str, update_id: str) -> None:
        """End the open stream of the update, if any, and wait until what came on it is on disk or admitted."""
        while (stream := self._open.get((node_id, update_id))) is not None:
            stream.take_over()
            await stream.ended.wait()

    @asynccontextmanager
    async def one(self, node_id: str, update_id: str) -> AsyncIterator[Stream]:
        """The block is the update's stream; an older one has ended before."""
        await self.take_over(node_id, update_id)
        stream = self._open[node_id, update_id] = Stream(self._idle_s)
        try:
            yield stream
        finally:
            del self._open[node_id, update_id]
            stream.ended.set()


def taken_over(what: str) -> Refused:
    """What the older stream's caller is told, if anybody still hears it; `what` says which update, and how much is here."""
    return Refused(
        grpc.StatusCode.ABORTED,
        Reason.TAKEN_OVER,
        f"A newer call of the node goes on with {what}; central closed this stream. Ask QueryUpload and go on from there.",
    )
