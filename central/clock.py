"""Central's time. Every age and every deadline is counted with it, so a clock that is set meanwhile stretches none.

In: the machine's clock when central starts, the time of the journal's last event, and a count of seconds that is never set.
Out: the present time. Guarantees: within one run of central, time passes as it does, whatever is done to the machine's
clock; it never goes back behind the journal, also not over a restart.

The rule: ages and deadlines that outlive the process are differences of `Journal.now` and times that the journal wrote.
Those that do not outlive it are differences of `time.monotonic`. The machine's own clock is read for certificates, which
others compare with theirs, and for texts.
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


class Clock:
    """One per journal; thread-safe. Calling it gives the time as RFC 3339 UTC with microseconds."""

    def __init__(self, wall: Callable[[], datetime] = wall_time, steady: Callable[[], float] = steady_s) -> None:
        self._wall = wall
        self._steady = steady
        self._begin = wall()
        self._began_s = steady()
        self._is_off = False

    def __call__(self) -> str:
        now = self._begin + timedelta(seconds=self._steady() - self._began_s)
        self._compare(now)
        return now.isoformat(timespec="microseconds").replace("+00:00", "Z")

    def go_on_from(self, at: str) -> None:
        """Be not earlier than `at`, the time of the last event."""
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
                "the machine's clock was set; central's ages and deadlines go on as before. Correct the clock if it is wrong now; "
                "a restart of central follows a clock that is ahead of the journal",
                extra={
                    "machine": self._wall().isoformat(timespec="seconds"),
                    "central": now.isoformat(timespec="seconds"),
                },
            )
        else:
            log.info("the machine's clock and central's are the same again")
