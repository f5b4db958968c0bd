"""The exact kernel against a dense float64 oracle, in slices and at its edges."""

from __future__ import annotations

import numpy as np
import pytest

from central.merging import gram as kernel
from central.merging.gram import fix_signs, gram, truncate
from tests.unit.central.merging.lora_factors import best_of_rank

K, OUT, IN = 5, 13, 11
D = np.array([1.0, -0.5, 2.0, 0.25, 1.5])


@pytest.fixture(params=[1, 4, 11, 13, 4096])
def factors(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray, np.ndarray]:
    """A and B, read in slices of so many features."""
    monkeypatch.setattr(kernel, "SLICE", request.param)
    random = np.random.default_rng(1)
    A = random.standard_normal((K, IN)).astype(np.float32)
    return A, random.standard_normal((OUT, K)).astype(np.float32)


def test_inner_products_are_those_of_whole_factors(factors: tuple[np.ndarray, np.ndarray]) -> None:
    A, B = (factor.astype(np.float64) for factor in factors)
    np.testing.assert_allclose(gram(factors[0], axis=1), A @ A.T, rtol=1e-12)
    np.testing.assert_allclose(gram(factors[1], axis=0), B.T @ B, rtol=1e-12)
    few_a, few_b = factors[0][:2], factors[1][:, :2]
    np.testing.assert_allclose(gram(factors[0], 1, few_a), A @ A[:2].T, rtol=1e-12)
    np.testing.assert_allclose(gram(factors[1], 0, few_b), B.T @ B[:, :2], rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_the_product_is_the_best_of_its_rank_and_balanced(
    factors: tuple[np.ndarray, np.ndarray], rank: int
) -> None:
    A, B = factors
    full = (B.astype(np.float64) * D) @ A
    best, tail = best_of_rank(full, rank)
    found = truncate(A, B, D, rank)
    assert (found.A.dtype, found.B.dtype) == (np.float32, np.float32)
    assert found.A.shape[0] == min(rank, K)
    np.testing.assert_allclose(found.B @ found.A, best, atol=1e-5)
    assert found.kept == pytest.approx(np.sum(best**2), rel=1e-6)
    assert found.cut == pytest.approx(tail**2, rel=1e-6, abs=1e-9)
    sigma = np.linalg.svd(full, compute_uv=False)[: min(rank, K)]
    np.testing.assert_allclose(np.sum(found.A**2, axis=1), sigma, rtol=1e-5)
    np.testing.assert_allclose(np.sum(found.B**2, axis=0), sigma, rtol=1e-5)
    assert (found.A[np.arange(min(rank, K)), np.argmax(np.abs(found.A), axis=1)] > 0).all()


def test_pairs_that_are_zero_take_no_part(factors: tuple[np.ndarray, np.ndarray]) -> None:
    A, B = factors
    d = np.array([1.0, 0.0, 2.0, 0.0, 0.0])
    found = truncate(A, B, d, 5)
    np.testing.assert_allclose(found.B @ found.A, (B * d) @ A, atol=1e-5)
    assert found.A.shape[0] == 2
    none = truncate(A, B, np.zeros(K), 5)
    assert (none.A.shape, none.B.shape, none.kept, none.cut) == ((0, IN), (OUT, 0), 0.0, 0.0)


def test_signs_are_fixed_in_pairs_and_a_zero_row_stays() -> None:
    A = np.array([[1.0, -3.0], [2.0, 1.0], [0.0, 0.0]])
    B = np.array([[1.0, 1.0, 1.0]])
    fixed_a, fixed_b = fix_signs(A, B)
    np.testing.assert_array_equal(fixed_a, [[-1.0, 3.0], [2.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(fixed_b, [[-1.0, 1.0, 1.0]])
