"""Student's t against published tables and closed forms, and the test of a mean."""

from __future__ import annotations

import math

import pytest

from central.gate.students_t import lower_tail, mean_below


@pytest.mark.parametrize(
    ("degrees", "tail", "t"),
    [
        (1, 0.05, 6.314),
        (1, 0.0005, 636.619),
        (2, 0.025, 4.303),
        (5, 0.05, 2.015),
        (5, 0.01, 3.365),
        (10, 0.005, 3.169),
        (23, 0.05, 1.714),
        (30, 0.001, 3.385),
        (120, 0.025, 1.980),
        (10**6, 0.05, 1.645),
        (10**6, 0.0005, 3.291),
    ],
)
def test_critical_values_of_the_tables(degrees: int, tail: float, t: float) -> None:
    """The tables give t with three decimals."""
    assert lower_tail(-t - 0.0006, degrees) < tail < lower_tail(-t + 0.0006, degrees)
    assert lower_tail(t, degrees) == pytest.approx(1 - lower_tail(-t, degrees), abs=1e-12)


@pytest.mark.parametrize("t", [-1e8, -40.0, -1.0, -1e-9, 0.0, 0.3, 7.0, 1e8])
def test_closed_forms_of_few_degrees(t: float) -> None:
    assert lower_tail(t, 1) == pytest.approx(math.atan2(1, -t) / math.pi, rel=1e-9)
    root = math.sqrt(2 + t * t)
    assert lower_tail(t, 2) == pytest.approx(
        1 / (root * (root - t)) if t < 0 else 0.5 + t / (2 * root), rel=1e-9
    )


def test_a_mean_that_is_below() -> None:
    """-1, -2 and -3 have mean -2 and standard error 1 / sqrt(3): t = -2 sqrt(3), 2 degrees."""
    t = -2 * math.sqrt(3)
    assert mean_below(3, -6.0, 14.0, 0.0) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))
    assert mean_below(3, -6.0, 14.0, -2.0) == 0.5
    assert mean_below(3, -6.0, 14.0, -9.0) > 0.98


def test_one_value_says_nothing_and_equal_ones_leave_no_doubt() -> None:
    assert mean_below(1, -100.0, 1e4, 0.0) == 1.0
    assert mean_below(4, 0.0, 0.0, 0.0) == 1.0
    assert mean_below(4, 0.0, 0.0, 0.1) == 0.0
    assert mean_below(4, -4.0, 4.0, 0.0) == 0.0
    assert mean_below(2, 0.0, 5e-324, 0.1) == 0.0, "half of the smallest number is 0"
    assert mean_below(3, 1e-310, 1e-323, 0.0) == 1.0
    third = 1 / 3
    assert mean_below(3, 3 * third, 3 * third * third, 0.0) == 1.0, "rounding is no spread below 0"
