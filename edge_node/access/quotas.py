"""How much each key may ask: requests a minute, and requests at the same time.

In: the names of keys whose requests arrive and leave. Out: None, or why a request has to wait and
how long. Guarantees: one key's requests use up no other key's share; memory is bounded by the
number of keys. One event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edge_node.serving_settings import LimitsSettings

MINUTE_S = 60.0
LEAVES_AFTER_S = 1.0
"""When a client may try again that has too many requests in flight."""


@dataclass(frozen=True)
class Wait:
    """Why a request is refused now, and after how many seconds it may come again."""

    text: str
    retry_after_s: float


class Quotas:
    """A token bucket and a counter for each key; "" stands for requests without one."""

    def __init__(self, limits: LimitsSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """How many requests a key had left, and when."""
        self._in_flight: Counter[str] = Counter()

    def enter(self, name: str) -> Wait | None:
        """Counts a request of the key `name`; one that has to wait is not counted."""
        most = self._limits.concurrent_requests
        if most is not None and self._in_flight[name] >= most:
            return Wait(
                f"{most} requests of this key are in flight, the most that this node takes "
                "(EDGE_SERVING__LIMITS__CONCURRENT_REQUESTS). Wait for one to end.",
                LEAVES_AFTER_S,
            )
        if (wait := self._draw(name)) is not None:
            return wait
        self._in_flight[name] += 1
        return None

    def leave(self, name: str) -> None:
        """A request that had entered is over."""
        self._in_flight[name] -= 1
        if not self._in_flight[name]:
            del self._in_flight[name]

    def _draw(self, name: str) -> Wait | None:
        size = self._limits.requests_per_minute
        if size is None:
            return None
        now = self._clock()
        left, before = self._buckets.get(name, (float(size), now))
        left = min(float(size), left + (now - before) * size / MINUTE_S)
        if left < 1:
            return Wait(
                f"This key has used its {size} requests a minute "
                "(EDGE_SERVING__LIMITS__REQUESTS_PER_MINUTE).",
                (1 - left) * MINUTE_S / size,
            )
        self._buckets[name] = left - 1, now
        return None
