"""The randomized kernel: near-optimal rank-R factors of `M = B diag(d) A` when its summed rank K is large.

In: A float32 [K, in_features], B float32 [out_features, K], K float64 coefficients d, a seeded generator; M is never built.
Out: factors of rank at most R in the same form as the exact kernel's. Cost O((in + out) K (R + 16)), where the exact kernel
pays O((in + out) K^2 + K^3). The same generator state gives the same bytes.

Halko, Martinsson, Tropp (arXiv:0909.4061), algorithm 4.4 (subspace iteration, q = 2) and 5.1 (SVD of Q^T M), with products
taken through the factors. The products that search the range are float32: terms that cancel (a removal) leave noise of 1e-7
of the cancelled norm in it, which no Gram squares, and which costs the result its square beside what is found. The core, from
which the result is read, is float64 over slices of features, as in gram.py.
"""

from __future__ import annotations

import numpy as np

from central.merging.gram import Matrix, Truncated, fix_signs, nothing
from protos.lora import Array

POWER_STEPS = 2
"""q: multiplications with M M^T that sharpen the range."""
OVERSAMPLING = 16
"""Columns beyond the rank."""
SLICE = 1024
"""Features converted to float64 at a time; bounds the copy to SLICE x K."""


def truncate_randomized(A: Array, B: Array, d: Matrix, rank: int, generator: np.random.Generator) -> Truncated:
    """Factors of rank at most `rank` close to the best of `B @ diag(d) @ A`.

    A float32 [K, in], B float32 [out, K], d float64 [K]. `kept` is exact; `cut` is what the sampled range shows of the
    rest and so only a lower bound: estimate the error with probes.
    """
    left, right = B, A.T  # M = left diag(d) right^T
    columns = min(rank + OVERSAMPLING, *A.shape, B.shape[0])
    basis = _search(left, d, right, generator.standard_normal((A.shape[1], columns)))
    for _ in range(POWER_STEPS):
        # A QR between any two products keeps the small directions from drowning in the large ones.
        basis = _search(left, d, right, _search(right, d, left, basis))
    core = _multiply(right, d, left, basis).T
    u, sigma, vt = np.linalg.svd(core, full_matrices=False)
    size = np.abs(d) * _norms(A, axis=1) * _norms(B, axis=0)
    real = int(np.count_nonzero(sigma > np.finfo(np.float32).eps * float(np.linalg.norm(size))))
    keep = min(rank, real)
    if keep == 0:
        return nothing(A, B)
    half = np.sqrt(sigma[:keep])
    squares = sigma[:real] ** 2
    new_a, new_b = fix_signs(half[:, None] * vt[:keep], basis @ (u[:, :keep] * half))
    return Truncated(new_a, new_b, float(squares[:keep].sum()), float(squares[keep:].sum()))


def _search(left: Array, d: Matrix, right: Array, x: Matrix) -> Matrix:
    """An orthonormal basis, float64, of `left diag(d) right^T x` in float32."""
    inner = right.T @ x.astype(np.float32)
    return np.linalg.qr((left @ (d[:, None] * inner).astype(np.float32)).astype(np.float64))[0]


def _multiply(left: Array, d: Matrix, right: Array, x: Matrix) -> Matrix:
    """`left diag(d) right^T x`, float64 [rows of left, columns of x]; left [m, K], right [n, K], x [n, columns]."""
    inner = np.zeros((d.size, x.shape[1]))
    for start in range(0, right.shape[0], SLICE):
        inner += right[start : start + SLICE].astype(np.float64).T @ x[start : start + SLICE]
    inner *= d[:, None]
    out = np.empty((left.shape[0], x.shape[1]))
    for start in range(0, left.shape[0], SLICE):
        out[start : start + SLICE] = left[start : start + SLICE].astype(np.float64) @ inner
    return out


def _norms(factor: Array, axis: int) -> Matrix:
    """Lengths of the rows of A (axis 1) or the columns of B (axis 0), float64."""
    return np.asarray(np.sqrt(np.sum(np.square(factor), axis=axis, dtype=np.float64)))
