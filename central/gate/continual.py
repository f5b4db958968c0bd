"""Figures of continual learning: what releases gained and lost, over all environments.

In: R, the success of each release in each environment, as fractions; None where it was not
measured. Row 0 is the base's. Also which environments a release learnt. Out: `Continual` of a
release. Pure; the one place where these are computed.

For row t, with l(e) the row at which e was first learnt, over the environments measured at t:

    average            mean of R[t][e]
    backward transfer  mean of R[t][e] - R[l(e)][e], where l(e) < t
    forward transfer   mean of R[l(e) - 1][e] - R[0][e], where 1 < l(e) <= t, and of
                       R[t][e] - R[0][e] where e has not been learnt by t
    forgetting         mean of max(R[s][e] for l(e) <= s < t) - R[t][e], where l(e) < t

They are those of Lopez-Paz and Ranzato 2017 (arXiv:1706.08840, section 2), where task e is learnt
at row e and t is the last; forgetting is that of Chaudhry et al. 2018 (arXiv:1801.10112, section
3). Forward transfer also counts what nobody has learnt yet: a federation may never learn some. What
the base could do has l(e) = 0.

Where R[l(e)][e] was not measured, the next measured row before t stands for it; for R[l(e) - 1][e]
it is the last one measured before l(e), but not the base's. Without one the term is left out. A
mean of nothing is None.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb

Row = Mapping[str, float | None]
"""Success by environment, 0 to 1; None or missing: not measured."""


@dataclass(frozen=True)
class Fall:
    """The environment that lies furthest below its best, and both successes."""

    environment: str
    best: float
    now: float


@dataclass(frozen=True)
class Continual:
    """Fractions; None: there is nothing that it could be the mean of.

    environments: how many were measured. worst: None where nothing learnt was measured again.
    """

    environments: int
    average: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    forgetting: float | None
    worst: Fall | None


@dataclass(frozen=True)
class _Track:
    """One environment up to a row; None: not measured."""

    base: float | None = None
    learnt_at: int | None = None
    before: float | None = None
    """The last value of rows 1 to l(e) - 1."""
    first: float | None = None
    best: float | None = None
    """The first and the largest value from row l(e) on, without the newest row."""
    now: float | None = None

    def then(self, value: float | None, learnt_at: int | None) -> _Track:
        """With one more row; `learnt_at` is l(e), if it is known by then."""
        first, best, before = self.first, self.best, self.before
        if self.now is not None and self.learnt_at is not None:
            first = self.now if first is None else first
            best = self.now if best is None else max(best, self.now)
        if learnt_at is None and value is not None:
            before = value
        return _Track(self.base, learnt_at, before, first, best, value)


@dataclass(frozen=True)
class Course:
    """The rows from the base to a release; immutable, so that lines of releases may branch.

    A further row costs time in the number of environments, not in that of rows.
    """

    row: int
    tracks: Mapping[str, _Track]

    @staticmethod
    def of_base(base: Row, learnt: Collection[str] = ()) -> Course:
        """Row 0. learnt: what the base could do."""
        tracks = {
            name: _Track(base.get(name), 0 if name in learnt else None, now=base.get(name))
            for name in {*base, *learnt}
        }
        return Course(0, tracks)

    def then(self, success: Row, learnt: Collection[str] = ()) -> Course:
        """With the row of the next release, and what it learnt."""
        row, tracks = self.row + 1, dict(self.tracks)
        for name in {*tracks, *success, *learnt}:
            track = tracks.get(name, _Track())
            learnt_at = row if track.learnt_at is None and name in learnt else track.learnt_at
            tracks[name] = track.then(success.get(name), learnt_at)
        return Course(row, tracks)

    def figures(self) -> Continual:
        """Of the newest row."""
        measured = {name: track for name, track in self.tracks.items() if track.now is not None}
        falls = [
            Fall(name, track.best, track.now)
            for name, track in measured.items()
            if track.best is not None and track.now is not None
        ]
        return Continual(
            environments=len(measured),
            average=_mean(track.now for track in measured.values()),
            backward_transfer=_mean(_less(track.now, track.first) for track in measured.values()),
            forward_transfer=_mean(self._forward(track) for track in measured.values()),
            forgetting=_mean(fall.best - fall.now for fall in falls),
            worst=max(
                falls, key=lambda fall: (fall.best - fall.now, fall.environment), default=None
            ),
        )

    def _forward(self, track: _Track) -> float | None:
        return None if self.row == 0 else _less(track.before, track.base)


def continual(rows: Sequence[Row], learnt: Mapping[str, int]) -> Continual:
    """The figures of the last of `rows`; row 0 is the base's.

    Args:
        learnt: l(e). An environment that is missing was never learnt.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("There is no row of successes; expected at least the base's.")
    at = [{name for name, row in learnt.items() if row == number} for number in range(len(rows))]
    course = Course.of_base(rows[0], at[0])
    for row, names in zip(rows[1:], at[1:], strict=True):
        course = course.then(row, names)
    return course.figures()


def pass_hat_k(samples: Iterable[tuple[int, int]], k: int) -> float | None:
    """pass^k: the chance that k answers to a task are all right, as a mean over tasks.

    For a task with c right ones of n answers, comb(c, k) / comb(n, k) is unbiased (Yao et al. 2024,
    tau-bench, arXiv:2406.12045). None without tasks.

    Args:
        samples: (n, c) of each task.

    Raises:
        ValueError: k is below 1, or a task has fewer than k answers, or more right than all.
    """
    tasks = list(samples)
    if k < 1 or any(not 0 <= c <= n or n < k for n, c in tasks):
        raise ValueError(
            f"pass^{k} of tasks with (answers, right ones) {sorted(set(tasks))[:5]}; expected k "
            "from 1 to the number of answers, and no more right ones than answers."
        )
    return _mean(comb(c, k) / comb(n, k) for n, c in tasks)


def _less(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
