"""The exact kernel: the best rank-R factors of `M = sum_j d_j b_j a_j^T`, found in the factors.

In: A float32 [K, in_features], B float32 [out_features, K] and K float64 coefficients d; M = B
diag(d) A is never built. Out: factors of the truncated SVD of M (Eckart-Young, so no rank-R matrix
is closer in Frobenius norm) and the norms of what was kept and what was cut. Cost O((in + out) K^2
+ K^3).

With G_A = A A^T = V_A S_A V_A^T, the rows of S_A^(-1/2) V_A^T A are orthonormal, and the same for
B; so the K x K core

    C = S_B^(1/2) V_B^T diag(d) V_A S_A^(1/2) = X Sigma Y^T

has the singular values of M. The right singular vectors of M are W^T = Y^T S_A^(-1/2) V_A^T A, and
because M W = B (diag(d) V_A S_A^(1/2) Y), the left factor needs no inverse of S_B.

The Grams square the condition number. Their products are therefore accumulated in float64, over
slices of the feature axis so that no float64 copy of a factor exists: with float32 Grams, terms
that cancel (a removal) leave phantom singular values, which the truncation prefers to true small
ones (measured: an increment of 1e-3 of the cancelled norm is lost wholly, relative error 0.99
against 2e-5). What that costs was measured: 8 of 52 ms at a summed rank of 256 on 4096 x 4096,
because the core costs more than the Grams; so there is no float32 path. Rows of A and columns of B
are scaled to length one first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos.rounding import Array

Matrix = npt.NDArray[np.float64]

SLICE = 4096
"""Features converted to float64 at a time; bounds the copy to SLICE x K."""


@dataclass(frozen=True)
class Truncated:
    """Balanced factors A float32 [rank, in] and B float32 [out, rank]: both carry sqrt(sigma).

    The rank is 0 when M is numerically zero. kept, cut: squared Frobenius norms of the returned
    product and of M minus it.
    """

    A: Array
    B: Array
    kept: float
    cut: float


def truncate(A: Array, B: Array, d: Matrix, rank: int) -> Truncated:
    """Best factors of rank at most `rank` of `B @ diag(d) @ A`; the same bytes for the same input.

    A float32 [K, in], B float32 [out, K], d float64 [K]. Singular values below float32 resolution
    of the largest term are noise of the inputs and are dropped.
    """
    gram_a, gram_b = gram(A, axis=1), gram(B, axis=0)
    norm_a, norm_b = np.sqrt(np.diag(gram_a)), np.sqrt(np.diag(gram_b))
    size = np.abs(d) * norm_a * norm_b
    used = np.flatnonzero(size > 0)
    if used.size == 0:
        return nothing(A, B)
    # One balanced coefficient per unit-length pair, so that neither update's split of its norm
    # between A and B matters.
    weight = (d * norm_a * norm_b)[used]
    unit_a = gram_a[np.ix_(used, used)] / np.outer(norm_a[used], norm_a[used])
    unit_b = gram_b[np.ix_(used, used)] / np.outer(norm_b[used], norm_b[used])
    values_a, vectors_a = _spectrum(unit_a)
    values_b, vectors_b = _spectrum(unit_b)
    root_a, root_b = np.sqrt(values_a), np.sqrt(values_b)
    core = (root_b[:, None] * vectors_b.T * weight) @ (vectors_a * root_a)
    _, sigma, right = np.linalg.svd(core, full_matrices=False)
    real = int(np.count_nonzero(sigma > np.finfo(np.float32).eps * float(np.linalg.norm(size))))
    keep = min(rank, real)
    if keep == 0:
        return nothing(A, B)
    y, half = right[:keep].T, np.sqrt(sigma[:keep])
    to_a = (vectors_a / root_a) @ y * half / norm_a[used, None]
    to_b = (d[used] * norm_a[used])[:, None] * ((vectors_a * root_a) @ y) / half
    new_a, new_b = _apply(A, used, to_a, axis=1), _apply(B, used, to_b, axis=0)
    squares = sigma[:real] ** 2
    return Truncated(
        *fix_signs(new_a, new_b), float(squares[:keep].sum()), float(squares[keep:].sum())
    )


def fix_signs(A: Matrix, B: Matrix) -> tuple[Array, Array]:
    """The pairs as float32, each with a fixed sign, which an SVD leaves free.

    The largest entry of every row of A is positive.
    """
    signs = np.sign(A[np.arange(A.shape[0]), np.argmax(np.abs(A), axis=1)])
    signs[signs == 0] = 1
    return (
        np.ascontiguousarray((A * signs[:, None]).astype(np.float32)),
        np.ascontiguousarray((B * signs).astype(np.float32)),
    )


def nothing(A: Array, B: Array) -> Truncated:
    """The zero product with the features of `A` and `B`."""
    return Truncated(
        np.zeros((0, A.shape[1]), np.float32), np.zeros((B.shape[0], 0), np.float32), 0.0, 0.0
    )


def gram(factor: Array, axis: int, other: Array | None = None) -> Matrix:
    """Inner products of the rank-one factors, float64 [K, K].

    Of A [K, in] with axis 1, of B [out, K] with axis 0. With `other`, of those of `factor` and
    those of `other`: float64 [K, L].
    """
    total = np.zeros((factor.shape[1 - axis], (factor if other is None else other).shape[1 - axis]))
    for start in range(0, factor.shape[axis], SLICE):
        part = _slice(factor, axis, start).astype(np.float64)
        same = part if other is None else _slice(other, axis, start).astype(np.float64)
        total += part @ same.T if axis == 1 else part.T @ same
    return total


def _apply(factor: Array, used: npt.NDArray[np.intp], coefficients: Matrix, axis: int) -> Matrix:
    """`coefficients.T @ factor[used]` (axis 1) or `factor[:, used] @ coefficients` (axis 0).

    Computed in float64, slice by slice.
    """
    keep = coefficients.shape[1]
    features = factor.shape[axis]
    out = np.empty((keep, features) if axis == 1 else (features, keep))
    for start in range(0, features, SLICE):
        part = _slice(factor, axis, start)
        if axis == 1:
            out[:, start : start + SLICE] = coefficients.T @ part[used].astype(np.float64)
        else:
            out[start : start + SLICE] = part[:, used].astype(np.float64) @ coefficients
    return out


def _slice(factor: Array, axis: int, start: int) -> Array:
    return factor[:, start : start + SLICE] if axis == 1 else factor[start : start + SLICE]


def _spectrum(gram: Matrix) -> tuple[Matrix, Matrix]:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix.

    Its numerical null space is left out.
    """
    values, vectors = np.linalg.eigh(gram)
    above = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return values[above], vectors[:, above]
