"""How long to wait before the next try: each pause is twice the last one, up to a limit.

In: the first and the longest pause. Out: pauses in seconds, without end.
"""

from __future__ import annotations

from collections.abc import Iterator


def doubling(first_s: float, longest_s: float) -> Iterator[float]:
    """Begin a new one after a success. `first_s` itself may be longer than `longest_s`."""
    pause_s = first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, longest_s)
