"""One-sided tests on paired outcomes, exact or by score, and Holm's correction.

In: b tasks that only the reference passed, c that only the candidate passed, n tasks. Out:
p-values. Pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from functools import lru_cache
from statistics import NormalDist
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

NEGLIGIBLE = 1e-18
"""A term that is smaller than this part of the largest term does not change the sum."""


def mcnemar(b: int, c: int) -> float:
    """p-value of the exact one-sided test of McNemar 1947; small after a loss.

    P(X >= b) for X ~ Binomial(b + c, 1/2).
    """
    return binomial_tail(b, b + c, 0.5)


def non_inferiority(b: int, c: int, n: int, margin: float) -> float:
    """p-value of "the loss is at least `margin`"; small when the loss is surely less.

    `margin` is a fraction of the tasks, 0 < margin < 1. This is the score test of Tango 1998,
    "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17. Its score is
    (b - c - n margin) / sqrt(n (2 q + margin (1 - margin))), where q is the maximum-likelihood
    estimate of the chance that only the candidate passes, given a loss of `margin`. The p-value is
    that of a normal distribution.
    """
    linear = -b - c + (2 * n - b + c) * margin
    q = (math.sqrt(linear * linear + 8 * n * c * margin * (1 - margin)) - linear) / (4 * n)
    return NormalDist().cdf((b - c - n * margin) / math.sqrt(n * (2 * q + margin * (1 - margin))))


def holm(p_values: Mapping[K, float], alpha: float) -> set[K]:
    """Keys of the tests that are significant; alpha is the family-wise error rate.

    The i-th smallest of M p-values is compared with alpha / (M - i + 1). The first one above its
    bound ends the search. Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    significant: set[K] = set()
    for index, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > alpha / (len(p_values) - index):
            break
        significant.add(key)
    return significant


@lru_cache(maxsize=65536)
def binomial_tail(k: int, n: int, p: float) -> float:
    """P(X >= k) for X ~ Binomial(n, p).

    The sum begins at the largest term, so nothing overflows. NEGLIGIBLE terms are left out.
    """
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
