"""When rounds may run: windows of the day.

In: texts such as `22:00-06:00` or `22:00-06:00 local`. Out: whether a window is open now. The
clock on the wall is read at each look, and nothing sleeps until a time of it: after a jump the next
look is right again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)(?: (UTC|local))?")


@dataclass(frozen=True)
class Window:
    """begins, ends: minutes after midnight; one that ends before it begins spans midnight."""

    begins: int
    ends: int
    is_local: bool

    def holds(self, now: datetime) -> bool:
        """Whether the window is open at `now`, which has a time zone."""
        there = now.astimezone(None if self.is_local else UTC)
        minute = 60 * there.hour + there.minute
        if self.begins < self.ends:
            return self.begins <= minute < self.ends
        return minute >= self.begins or minute < self.ends


def read_window(text: str) -> Window:
    """The window that `text` says; raises ValueError."""
    found = _WINDOW.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no window; expected HH:MM-HH:MM, for example 22:00-06:00 (UTC) or "
            "22:00-06:00 local"
        )
    begin_h, begin_m, end_h, end_m = (int(part) for part in found.groups()[:4])
    begins, ends = 60 * begin_h + begin_m, 60 * end_h + end_m
    if begins == ends:
        raise ValueError(
            f"{text!r} begins when it ends; expected two different times, or no window for always"
        )
    return Window(begins, ends, found.group(5) == "local")


def is_open(
    windows: Sequence[str], now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> bool:
    """Whether one of the windows is open, or there is none."""
    return not windows or any(read_window(text).holds(now()) for text in windows)
