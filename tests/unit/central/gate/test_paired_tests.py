"""Tests on paired outcomes against exact sums, published figures and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from central.gate.paired_tests import binomial_tail, holm, mcnemar, non_inferiority


@pytest.mark.parametrize(
    ("k", "n", "p"),
    [
        (8, 10, 0.5),
        (1, 3, 0.2),
        (0, 5, 0.5),
        (30, 60, 0.45),
        (60, 60, 0.9),
        (1, 60, 0.99),
        (3, 900, 0.8),
        (200, 300, 0.1),
    ],
)
def test_binomial_tail_is_exact(k: int, n: int, p: float) -> None:
    expected = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    assert binomial_tail(k, n, p) == pytest.approx(expected, rel=1e-9)


def test_binomial_tail_at_its_edges() -> None:
    assert binomial_tail(3, 2, 0.5) == 0.0
    assert binomial_tail(1, 4, 0.0) == 0.0
    assert binomial_tail(4, 4, 1.0) == 1.0
    assert 0 < binomial_tail(5200, 10_000, 0.5) < 1e-4


def test_mcnemar_is_the_exact_sign_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10, 2) == pytest.approx(79 / 4096)
    assert mcnemar(2, 10) == pytest.approx(1 - 13 / 4096)


def test_holm_stops_at_the_first_that_is_not_significant() -> None:
    # 0.01 <= 0.05/4 and 0.016 <= 0.05/3, but 0.03 > 0.05/2; so 0.04 is not looked at.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.016}, 0.05) == {"b", "d"}
    assert holm({}, 0.05) == set()


def test_non_inferiority_estimates_its_nuisance_by_maximum_likelihood() -> None:
    for b, c, n, margin in [
        (12, 9, 100, 0.05),
        (0, 0, 100, 0.05),
        (30, 3, 200, 0.1),
        (4, 40, 500, 0.02),
    ]:
        # log likelihood at (only candidate q, only reference q + margin), on a fine grid instead of
        # in closed form
        q = np.linspace(1e-9, (1 - margin) / 2 - 1e-9, 400_001)
        likelihood = (
            b * np.log(q + margin)
            + c * np.log(q) * (c > 0)
            + (n - b - c) * np.log1p(-2 * q - margin)
        )
        best = float(q[np.argmax(likelihood)])
        z = (b - c - n * margin) / math.sqrt(n * (2 * best + margin * (1 - margin)))
        expected = 0.5 * math.erfc(-z / math.sqrt(2))
        assert non_inferiority(b, c, n, margin) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("n", "churn"), [(100, 0.02), (100, 0.1), (800, 0.1)])
def test_non_inferiority_keeps_its_level_at_the_margin(n: int, churn: float) -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, [churn + 0.05, churn, 0.95 - 2 * churn], size=4000)
    for level in (0.05, 0.01):
        errors = np.mean([non_inferiority(int(b), int(c), n, 0.05) <= level for b, c, _ in counts])
        assert errors <= 1.35 * level + 2 * math.sqrt(level / 4000)


def test_non_inferiority_falls_with_what_the_candidate_gains() -> None:
    p_values = [non_inferiority(b, 20, 400, 0.05) for b in (10, 20, 30, 40, 60)]
    assert p_values == sorted(p_values)
    assert p_values[0] < 0.001
    assert p_values[-1] > 0.98
