"""One-sided t-test of a mean, from count, sum and sum of squares.

In: n values' sums. Out: p-values. Pure Python.
"""

from __future__ import annotations

import math

SMALLEST = 1e-300
"""Stands for a denominator of 0 in the continued fraction."""
NEGLIGIBLE = 1e-15
MAX_TERMS = 10_000
"""A million degrees of freedom take a few hundred."""


def mean_below(n: int, total: float, squares: float, bound: float) -> float:
    """p-value of "the values' true mean is `bound` or more": small when it is surely less.

    Student 1908, "The probable error of a mean", Biometrika 6. 1 for a single value, which has no
    spread. Values that are all equal leave no doubt.

    Args:
        n: how many values, at least 1.
        total: their sum.
        squares: the sum of their squares.
    """
    if n < 2:
        return 1.0
    mean = total / n
    variance = max(squares - total * mean, 0.0) / (n - 1)
    error = math.sqrt(variance / n)
    if error == 0:  # also of a variance that is too small to be divided
        return 0.0 if mean < bound else 1.0
    return lower_tail((mean - bound) / error, n - 1)


def lower_tail(t: float, degrees: int) -> float:
    """P(T <= t) of Student's t with `degrees` of freedom, at least 1.

    P(T > |t|) = I_x(degrees / 2, 1 / 2) / 2 with x = degrees / (degrees + t^2).
    """
    square = t * t
    beyond = _beta(degrees / (degrees + square), square / (degrees + square), degrees / 2, 0.5) / 2
    return beyond if t <= 0 else 1 - beyond


def _beta(x: float, rest: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b); rest = 1 - x, exact where it is small.

    By its continued fraction (NIST Digital Library of Mathematical Functions, 8.17.22), which
    converges fast for x < (a + 1) / (a + b + 2). Else I_x(a, b) = 1 - I_rest(b, a).
    """
    if x <= 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(rest, x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logarithm + a * math.log(x) + b * math.log(rest)) / a
    # 1 + d_1 / (1 + d_2 / (1 + ...)) from the top down, by the method of Lentz 1976.
    value = above = 1.0
    below = 0.0
    for number in range(1, MAX_TERMS):
        m, d = number // 2, x / ((a + number - 1) * (a + number))
        d *= -(a + m) * (a + b + m) if number % 2 else m * (b - m)
        below = 1 / ((1 + d * below) or SMALLEST)
        above = (1 + d / above) or SMALLEST
        value *= above * below
        if abs(above * below - 1) < NEGLIGIBLE:
            break
    return front / value
