"""The search for the update that hurts, after a candidate of several updates was rejected.

In: verdicts. Out: the groups of updates that are to be tried one after the other, each as a plan of
its own on the stable head. A rejected group is cut in two and both halves are tried; an accepted
half is released, a rejected single update is the one that hurts. So every verdict either decides a
group for good or makes it smaller: n updates need at most 2n - 2 tries after the first, one bad
update among n about 2 log2(n), and no update is tried twice in the same group.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Isolation:
    """One search in one cohort; `groups` are update ids, the first group is tried next."""

    plan_id: str
    """The plan whose candidate was rejected first. Parts of it are tried, with its weights."""
    tries: int
    """Number of verdicts since."""
    groups: tuple[tuple[str, ...], ...]


def after_verdict(
    current: Isolation | None,
    plan_id: str,
    waiting: Collection[str],
    halves: Sequence[tuple[str, ...]],
) -> Isolation | None:
    """The search after a verdict on `plan_id`; None when nothing is left to try.

    `halves` are tried next. Then come the groups before them, with the updates that still wait.
    """
    before = current or Isolation(plan_id, -1, ())
    left = (tuple(update for update in group if update in waiting) for group in before.groups)
    groups = (*halves, *(group for group in left if group))
    return replace(before, tries=before.tries + 1, groups=groups) if groups else None


def bisect(updates: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two halves of at least two updates, each given as (node id, update id).

    One node's updates stay together as far as they can.
    """
    ordered = [update_id for _, update_id in sorted(updates, key=lambda pair: pair[0])]
    middle = (len(ordered) + 1) // 2
    return tuple(ordered[:middle]), tuple(ordered[middle:])
