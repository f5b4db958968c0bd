"""Time that passes evenly, whatever is done to the machine's clock meanwhile.

In: the machine's clock when the program starts, the last time that it recorded, and a count of
seconds that nobody can set. Out: the present time.
Guarantees: within one run, time passes as it does. It never goes back behind the last recorded
time, also not over a restart.

The rule: an age or a deadline that outlives the process is a difference of recorded times and of
this clock. One that does not outlive it is a difference of `time.monotonic`. The machine's own
clock is read for certificates, which others compare with theirs, and for texts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

log = logging.getLogger(__name__)

NOTICED = timedelta(seconds=60)


def wall_time() -> datetime:
    """What the machine's clock says."""
    return datetime.now(UTC)


def steady_s() -> float:
    """Seconds that pass also while the machine sleeps; nobody can set them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def written(moment: datetime) -> str:
    """A time in UTC as RFC 3339 with microseconds; `datetime.fromisoformat` reads it."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


class Clock:
    """Thread-safe. Calling it gives the time as RFC 3339 UTC with microseconds."""

    def __init__(
        self, wall: Callable[[], datetime] = wall_time, steady: Callable[[], float] = steady_s
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._begin = wall()
        self._began_s = steady()
        self._is_off = False

    def __call__(self) -> str:
        now = self._begin + timedelta(seconds=self._steady() - self._began_s)
        self._compare(now)
        return written(now)

    def go_on_from(self, at: str) -> None:
        """Be not earlier than `at`, the last recorded time."""
        last, now = datetime.fromisoformat(at), datetime.fromisoformat(self())
        if last > now:
            self._begin += last - now
            self()

    def _compare(self, now: datetime) -> None:
        """Say once when the machine's clock is another, and once when it is the same again."""
        off = now - self._wall()
        if (abs(off) >= NOTICED) == self._is_off:
            return
        self._is_off = not self._is_off
        if self._is_off:
            log.warning(
                "the machine's clock was set; ages and deadlines go on as before. Correct the "
                "clock if it is wrong now; a restart follows a clock that is ahead",
                extra={
                    "machine": self._wall().isoformat(timespec="seconds"),
                    "counted": now.isoformat(timespec="seconds"),
                },
            )
        else:
            log.info("the machine's clock and the counted time are the same again")
