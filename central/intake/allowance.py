"""How many updates a node may have admitted in an hour.

In: a node's id. Out: nothing, or a refusal that says how long to wait. Guarantee: of updates that
end at the same moment no more are let through than of others. A restart forgets what was counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

import grpc

from central.errors import Reason, Refused

HOUR_S = 3600.0


class Allowance:
    """`per_hour` updates of a node at once, then one every so often. Thread-safe."""

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds and is never set back."""
        self._per_hour = per_hour
        self._every_s = HOUR_S / per_hour
        self._clock = clock
        self._paid_until: dict[str, float] = {}
        """By node: the time at which its admitted updates are paid for."""
        self._lock = threading.Lock()

    def expect_one(self, node_id: str) -> None:
        """Raises Refused when the node has to wait."""
        with self._lock:
            self._expect(node_id, self._clock())

    @contextmanager
    def one(self, node_id: str) -> Iterator[None]:
        """The block admits one more update of the node; it does not count when the block raises.

        Raises Refused when the node has to wait.
        """
        with self._lock:
            now = self._clock()
            self._expect(node_id, now)
            self._paid_until[node_id] = now + self._owed_s(node_id, now) + self._every_s
        try:
            yield
        except BaseException:
            with self._lock:
                self._paid_until[node_id] -= self._every_s
            raise

    def _expect(self, node_id: str, now: float) -> None:
        wait_s = self._owed_s(node_id, now) + self._every_s - HOUR_S
        if wait_s > 1e-6:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_UPDATES,
                f"Node {node_id} had {self._per_hour} updates admitted within the last hour; "
                "central admits no more (CENTRAL_LIMITS__NODE_UPDATES_PER_HOUR). Try again in "
                f"{ceil(wait_s)} s.",
            )

    def _owed_s(self, node_id: str, now: float) -> float:
        return max(0.0, self._paid_until.get(node_id, 0.0) - now)
