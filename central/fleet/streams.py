"""How many streams a node may hold open at once: one faulty site must not use up the memory.

In: a node's name when one of its streams begins. Out: nothing, or Refused. Used on the event loop
alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from central.errors import Reason, Refused


class OpenStreams:
    """Streams of one kind, counted by node."""

    def __init__(self, kind: str, limit: int, setting: str) -> None:
        """`kind` and `setting` are for the message: what is limited, and which setting says so."""
        self._kind = kind
        self._limit = limit
        self._setting = setting
        self._open: Counter[str] = Counter()

    @contextmanager
    def one(self, node_id: str) -> Iterator[None]:
        """Count the block as a stream of the node; raises Refused when it has too many."""
        if self._open[node_id] >= self._limit:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_STREAMS,
                f"Node {node_id} has {self._open[node_id]} {self._kind} open; central allows "
                f"{self._limit} ({self._setting}). End one of them, or wait: what is silent is "
                "closed, then try again.",
            )
        self._open[node_id] += 1
        try:
            yield
        finally:
            self._open[node_id] -= 1
            if not self._open[node_id]:
                del self._open[node_id]
