"""Robust filters in product space: they choose which of many increments to merge.

In: increments. `product_gram` makes of them the N x N inner products <dW_i, dW_j>, through the
factors; the filters see only that matrix, in which A -> T A, B -> B T^-1 changes nothing. (On raw
factors a node's free choice of T decides what Krum picks.) Out: factors for the increments, or
which are kept, with every increment's score.

These are filters, not proofs: they assume that most nodes are honest and alike. A node that alone
holds some knowledge looks like an outlier, so no filter is on by default; the gate decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.merging.errors import MergeError
from central.merging.gram import Matrix, gram
from central.merging.module_sum import check_module
from protos.lora import LoraModule, LoraTensors
from protos.rounding import Array

MAD_THRESHOLD = 3.5
"""Modified z-score above which a distance is an outlier (Iglewicz and Hoaglin, 1993)."""
SPREAD_FLOOR = 0.05
"""Least spread of distances, relative to the median norm.

Among near copies a small difference is no evidence.
"""


@dataclass(frozen=True)
class Selection:
    """Which increments are kept, and why.

    kept: indices, ascending. scores: float64 [N], the larger the less typical. limit: the largest
    score that is kept.
    """

    kept: list[int]
    scores: Matrix
    limit: float


def product_gram(updates: Sequence[LoraTensors], *, block: int | None = None) -> Matrix:
    """<dW_i, dW_j> over all modules, float64 [N, N], scales included.

    tr((B_i A_i)^T B_j A_j) = sum((A_i A_j^T) * (B_i^T B_j)): cost O((in + out) K^2) per module for
    a summed rank K. With `block`, at most two blocks of so many increments are taken from `updates`
    at a time, each about N / (2 block) times; so a sequence that reads them from disk bounds the
    memory. Raises MergeError for modules that do not fit.
    """
    count = len(updates)
    step = block or max(count, 1)
    total = np.zeros((count, count))
    for first in range(0, count, step):
        rows = [updates[i] for i in range(first, min(first + step, count))]
        for second in range(first, count, step):
            # Not bound to a name, so that a block is gone before the next one is read.
            part = _products(
                rows,
                rows
                if second == first
                else [updates[i] for i in range(second, min(second + step, count))],
            )
            total[first : first + len(rows), second : second + part.shape[1]] = part
            total[second : second + part.shape[1], first : first + len(rows)] = part.T
    return total


def clip_norms(gram: Matrix, limit: float | None = None) -> Matrix:
    """Factors for the increments, float64 [N], that bring every norm to at most `limit`.

    `limit` None: the median norm.
    """
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if limit is None:
        limit = float(np.median(norms)) if norms.size else 0.0
    if not limit >= 0:
        raise MergeError(f"Limit of the norm is {limit}; expected zero or more.")
    return np.where(
        norms > limit, limit / np.maximum(norms, max(limit, float(np.finfo(np.float64).tiny))), 1.0
    )


def keep_near(gram: Matrix, threshold: float = MAD_THRESHOLD) -> Selection:
    """All but the distance outliers.

    An increment's score is its median distance to the others. An outlier's score is `threshold`
    times 1.4826 MAD above the median. Fewer than four increments are all kept: no majority could
    tell.
    """
    count = gram.shape[0]
    if count < 4:
        return Selection(list(range(count)), np.zeros(count), math.inf)
    others = ~np.eye(count, dtype=bool)
    typical = np.median(np.sqrt(_squared_distances(gram))[others].reshape(count, count - 1), axis=1)
    middle = float(np.median(typical))
    spread = 1.4826 * float(np.median(np.abs(typical - middle)))
    spread = max(spread, SPREAD_FLOOR * float(np.median(np.sqrt(np.maximum(np.diag(gram), 0.0)))))
    limit = middle + threshold * spread
    return Selection([int(i) for i in np.flatnonzero(typical <= limit)], typical, limit)


def multi_krum(gram: Matrix, malicious: int, keep: int | None = None) -> Selection:
    """The `keep` (N - malicious when None) best by Krum's score, ties by the lower index.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 3: the score of i
    is the sum of its N - f - 2 smallest squared distances to others. Raises MergeError unless N >=
    2 f + 3, which its guarantee needs.
    """
    count = gram.shape[0]
    if malicious < 0 or count < 2 * malicious + 3:
        raise MergeError(
            f"Krum was asked to stand {malicious} malicious of {count} increments; it needs at "
            f"least {2 * max(malicious, 0) + 3}. Wait for more updates or lower the number."
        )
    keep = count - malicious if keep is None else keep
    if not 1 <= keep <= count:
        raise MergeError(
            f"Krum was asked to keep {keep} of {count} increments; expected 1 to {count}."
        )
    distances = _squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, : count - malicious - 2].sum(axis=1)
    kept = sorted(int(i) for i in np.argsort(scores, kind="stable")[:keep])
    return Selection(kept, scores, float(np.max(scores[kept])))


def _products(rows: Sequence[LoraTensors], columns: Sequence[LoraTensors]) -> Matrix:
    """Inner products of the increments, float64 [rows, columns]."""
    total = np.zeros((len(rows), len(columns)))
    for name in sorted({name for tensors in rows for name in tensors.modules}):
        left, right = _Stack.of(name, rows), _Stack.of(name, columns)
        if left is None or right is None:
            continue
        check_module(name, right.first, like=(left.first.B.shape[0], left.first.A.shape[1]))
        products = (
            gram(left.A, 1, right.A) * gram(left.B, 0, right.B) * np.outer(left.scale, right.scale)
        )
        sums = np.add.reduceat(np.add.reduceat(products, left.starts, 0), right.starts, 1)
        total[np.ix_(left.owners, right.owners)] += sums
    return total


@dataclass(frozen=True)
class _Stack:
    """One module of several increments: A [K, in], B [out, K], a scale per row of A.

    starts: first row of each owner.
    """

    owners: list[int]
    first: LoraModule
    A: Array
    B: Array
    scale: Matrix
    starts: npt.NDArray[np.intp]

    @classmethod
    def of(cls, name: str, updates: Sequence[LoraTensors]) -> _Stack | None:
        owners = [
            i
            for i, tensors in enumerate(updates)
            if name in tensors.modules and tensors.modules[name].rank
        ]
        modules = [updates[i].modules[name] for i in owners]
        if not modules:
            return None
        for module in modules:
            check_module(name, module, like=(modules[0].B.shape[0], modules[0].A.shape[1]))
        return cls(
            owners=owners,
            first=modules[0],
            A=np.concatenate([module.A for module in modules]),
            B=np.concatenate([module.B for module in modules], axis=1),
            scale=np.concatenate([np.full(module.rank, module.scale) for module in modules]),
            starts=np.cumsum([0, *(module.rank for module in modules[:-1])]),
        )


def _squared_distances(gram: Matrix) -> Matrix:
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
