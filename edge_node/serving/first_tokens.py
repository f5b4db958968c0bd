"""How long users' streams wait for their first piece.

In: when a user's streamed request arrives, gets its first piece, and leaves. Out: the longest such
wait of late, also of those that still wait. One event loop only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_S = 10.0
"""How long a wait that is over counts."""
MOST = 1000
"""Waits that are remembered."""


class FirstTokens:
    """Of one serving process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[object, float] = {}
        self._over: deque[tuple[float, float]] = deque(maxlen=MOST)
        """(when, seconds) of those that got their first piece."""

    def begin(self, request: object) -> None:
        """A stream was asked for."""
        self._waiting[request] = self._clock()

    def came(self, request: object) -> None:
        """A piece of it goes out; only the first one counts."""
        began = self._waiting.pop(request, None)
        if began is not None:
            now = self._clock()
            self._over.append((now, now - began))

    def left(self, request: object) -> None:
        """It is over, perhaps without any piece."""
        self._waiting.pop(request, None)

    def longest_s(self) -> float:
        """The longest wait that was over in the last WINDOW_S seconds, or that goes on; or 0."""
        now = self._clock()
        while self._over and self._over[0][0] < now - WINDOW_S:
            self._over.popleft()
        over = [seconds for _, seconds in self._over]
        return max([0.0, *over, *(now - began for began in self._waiting.values())])
