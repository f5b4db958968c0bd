"""Which of a merge's updates makes its strategy fail.

In: how many updates there are, and a function that tries the merge with some of them. Out: the one
that causes the failure, or None when no single one does. The same tries in the same order every
time, so a merge that is done again blames the same update.

A failure with no update at all is the strategy's or the parent release's. Otherwise halves are
tried, then halves of the half that fails alone, until one update is left: at most 2 log2(n) + 1
tries. Where neither half fails alone, the updates fail only together, and nobody is blamed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_cause(count: int, fails: Callable[[Sequence[int]], bool]) -> int | None:
    """Index of the update that makes the merge fail, which it does with all `count` of them.

    `fails(kept)` says whether it also fails with those at the indices `kept` alone.
    """
    if fails(()):
        return None
    suspects: Sequence[int] = range(count)
    while len(suspects) > 1:
        middle = len(suspects) // 2
        half = next((half for half in (suspects[:middle], suspects[middle:]) if fails(half)), None)
        if half is None:
            return None
        suspects = half
    return suspects[0] if suspects else None
