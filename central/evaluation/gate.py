"""The gate: is any environment worse than before? A candidate need not be good, only not worse.

In: paired counts per environment, high-water marks, tolerances. Out: a verdict with counts, p-values and a text.

The rule. For environment e with n pairs let b = tasks that only the reference passed, c = tasks that only the candidate
passed, k = tasks the candidate passed, t = the tolerance of e in points / 100, and h the high-water mark: the highest pass
rate on e that an accepted release of this cohort surely had, measured in an earlier accepted verdict (as candidate or as
reference), "surely" being the exact one-sided lower confidence bound (Clopper-Pearson) at 1 - alpha:
    P(X >= x) = alpha, X ~ Binomial(m, h), for x passes of m tasks. Two ways to fall:

1. Below the reference. fall = (b - c) / n > t, and the one-sided exact McNemar test is significant:
       p_reference = P(X >= b), X ~ Binomial(b + c, 1/2).
2. Below the high-water mark. k / n < h - t, and the one-sided exact binomial test at the tolerated rate is significant:
       p_mark = P(X <= k), X ~ Binomial(n, h - t).

Every p-value of the verdict (one per environment, a second where there is a mark) goes through Holm's step-down
correction: with M of them in ascending order, the i-th is significant when p_(i) <= alpha / (M - i + 1) and all before it were. So
with M true null hypotheses the chance that any test errs is at most alpha; the tolerance makes it smaller still.
The candidate is accepted when no environment fell. The mark keeps losses within the tolerance from adding up over releases.

Sources: McNemar 1947 (exact form); Clopper and Pearson 1934; Holm 1979, "A simple sequentially rejective multiple test
procedure". Departure: the mark is the best of several measurements, so taking the measured rate itself would reject one
unchanged candidate in 25 (simulated: ten releases, three environments, 60 tasks); with the bound it is below one in 100.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from central.evaluation.counts import PairedCounts

NEGLIGIBLE = 1e-18
"""Part of the largest term of a sum below which a term changes nothing."""


@dataclass(frozen=True)
class Mark:
    """A measurement of one environment, and the release that was measured."""

    passed: int
    total: int
    release: str

    def sure_rate(self, alpha: float) -> float:
        """Pass rate that the release surely had (see the module's docstring)."""
        return _lower_bound(self.passed, self.total, alpha)


@dataclass(frozen=True)
class Verdict:
    """environments: per environment the counts and figures; high_water: the marks that the decision was made against."""

    accepted: bool
    text: str
    environments: dict[str, dict[str, Any]]
    high_water: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Gate:
    """alpha: level of the family of tests; the tolerances are in points (percent of tasks)."""

    alpha: float
    tolerance_points: float
    anchor_tolerance_points: float
    environments: Mapping[str, float]
    """Tolerance by environment name; wins over both above."""

    def decide(self, pooled: Sequence[PairedCounts], marks: Mapping[str, Mark]) -> Verdict:
        """The verdict on one candidate (rule in the module's docstring); accepts when `pooled` is empty."""
        rates = {name: mark.sure_rate(self.alpha) for name, mark in marks.items()}
        tests = [test for counts in pooled for test in self._tests(counts, rates)]
        significant = holm(tests, self.alpha)
        findings = [self._finding(counts, rates, tests, significant) for counts in pooled]
        fell = [found.counts.environment for found in findings if found.below_reference or found.below_mark]
        head = f"rejected: {', '.join(fell)} fell" if fell else "accepted: no environment fell"
        return Verdict(
            accepted=not fell,
            text=". ".join([head, *(found.line() for found in findings)]) + ".",
            environments={found.counts.environment: found.to_json() for found in findings},
            high_water={
                name: {"passed": mark.passed, "total": mark.total, "release": mark.release, "rate": rates[name]}
                for name, mark in sorted(marks.items())
            },
        )

    def _tests(self, counts: PairedCounts, rates: Mapping[str, float]) -> list[_Test]:
        name = counts.environment
        only = counts.only_reference + counts.only_candidate
        tests = [_Test(name, "reference", binomial_tail(counts.only_reference, only, 0.5))]
        if name in rates:
            tolerated = max(rates[name] - self._tolerance(counts), 0.0)
            # P(X <= k) of Binomial(n, q) is P(n - X >= n - k), and n - X ~ Binomial(n, 1 - q).
            failed = counts.total - counts.candidate_passed
            tests.append(_Test(name, "mark", binomial_tail(failed, counts.total, 1 - tolerated)))
        return tests

    def _finding(
        self,
        counts: PairedCounts,
        rates: Mapping[str, float],
        tests: Sequence[_Test],
        significant: set[tuple[str, str]],
    ) -> _Finding:
        name, tolerance = counts.environment, self._tolerance(counts)
        p = {test.against: test.p for test in tests if test.environment == name}
        fall = (counts.only_reference - counts.only_candidate) / counts.total
        short = rates[name] - counts.candidate_passed / counts.total if name in rates else 0.0
        return _Finding(
            counts=counts,
            tolerance=tolerance,
            fall=fall,
            p_reference=p["reference"],
            mark=rates.get(name),
            p_mark=p.get("mark"),
            below_reference=fall > tolerance and (name, "reference") in significant,
            below_mark=short > tolerance and (name, "mark") in significant,
        )

    def _tolerance(self, counts: PairedCounts) -> float:
        default = self.anchor_tolerance_points if counts.anchor else self.tolerance_points
        return self.environments.get(counts.environment, default) / 100


def high_water(verdicts: Iterable[tuple[str, str, Mapping[str, Mapping[str, Any]]]], alpha: float) -> dict[str, Mark]:
    """Highest mark per environment from accepted verdicts: (candidate id, reference id, Verdict.environments) each."""
    best: dict[str, tuple[float, Mark]] = {}
    for candidate, reference, environments in verdicts:
        for name, figures in environments.items():
            total, both = int(figures["total"]), int(figures["both"])
            for mark in (
                Mark(both + int(figures["only_candidate"]), total, candidate),
                Mark(both + int(figures["only_reference"]), total, reference),
            ):
                rate = mark.sure_rate(alpha)
                if name not in best or rate > best[name][0]:
                    best[name] = (rate, mark)
    return {name: mark for name, (_, mark) in best.items()}


@lru_cache(maxsize=4096)
def _lower_bound(passed: int, total: int, alpha: float) -> float:
    """Clopper-Pearson one-sided lower bound at confidence 1 - alpha, by bisection."""
    low, high = 0.0, passed / total
    for _ in range(40):
        middle = (low + high) / 2
        if binomial_tail(passed, total, middle) > alpha:
            high = middle
        else:
            low = middle
    return low


@dataclass(frozen=True)
class _Test:
    environment: str
    against: str
    p: float


@dataclass(frozen=True)
class _Finding:
    """What the tests say of one environment; rates and falls are fractions."""

    counts: PairedCounts
    tolerance: float
    fall: float
    p_reference: float
    mark: float | None
    p_mark: float | None
    below_reference: bool
    below_mark: bool

    def to_json(self) -> dict[str, Any]:
        return {
            **self.counts.to_json(),
            "fall_points": round(100 * self.fall, 3),
            "tolerance_points": round(100 * self.tolerance, 3),
            "p_reference": self.p_reference,
            "p_mark": self.p_mark,
            "below_reference": self.below_reference,
            "below_mark": self.below_mark,
        }

    def line(self) -> str:
        counts = self.counts
        text = (
            f"{'anchor ' if counts.anchor else ''}{counts.environment}: {counts.reference_passed} -> "
            f"{counts.candidate_passed} of {counts.total} (only reference {counts.only_reference}, only candidate "
            f"{counts.only_candidate}, p {self.p_reference:.2g}, tolerance {100 * self.tolerance:g} points, "
            f"{counts.nodes} node{'s' if counts.nodes > 1 else ''}"
        )
        if self.mark is not None:
            text += f"; high-water mark {100 * self.mark:.1f} %, p {self.p_mark:.2g}"
        text += ")"
        if self.below_reference:
            text += ", significantly below the reference"
        if self.below_mark:
            text += ", significantly below the high-water mark"
        return text


def holm(tests: Sequence[_Test], alpha: float) -> set[tuple[str, str]]:
    """(environment, against) of the tests that are significant after Holm's correction."""
    significant: set[tuple[str, str]] = set()
    for index, test in enumerate(sorted(tests, key=lambda test: test.p)):
        if test.p > alpha / (len(tests) - index):
            break
        significant.add((test.environment, test.against))
    return significant


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p), summed from its largest term on: no overflow, and terms below 1e-18 of it are left out."""
    if k <= 0:
        return 1.0
    if p <= 0 or k > n:
        return 0.0
    if p >= 1:
        return 1.0
    top, odds = max(k, int((n + 1) * p)), p / (1 - p)
    logarithm = math.lgamma(n + 1) - math.lgamma(top + 1) - math.lgamma(n - top + 1)
    largest = math.exp(logarithm + top * math.log(p) + (n - top) * math.log1p(-p))
    terms = [1.0]
    for i in range(top, n):
        terms.append(terms[-1] * odds * (n - i) / (i + 1))
        if terms[-1] < NEGLIGIBLE:
            break
    term = 1.0
    for i in range(top, k, -1):
        term *= i / ((n - i + 1) * odds)
        if term < NEGLIGIBLE:
            break
        terms.append(term)
    return min(1.0, largest * math.fsum(terms))
