"""Robust filters in product space: which of many increments to merge, judged by their products and never by their factors.

In: increments. `product_gram` makes of them the N x N inner products <dW_i, dW_j>, through the factors; the filters see only
that matrix, in which A -> T A, B -> B T^-1 changes nothing. (On raw factors a node's free choice of T decides what Krum picks.)
Out: factors for the weights, or the indices that are kept, ascending.

These are filters, not proofs: they assume that most nodes are honest and alike. A node that alone holds some knowledge
looks like an outlier, so no filter is on by default; the gate decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from central.merging.errors import MergeError
from central.merging.gram import Matrix, gram
from central.merging.module_sum import check_module
from protos.lora import LoraTensors

MAD_THRESHOLD = 3.5
"""Modified z-score above which a distance is an outlier (Iglewicz and Hoaglin, 1993)."""
SPREAD_FLOOR = 0.05
"""Least spread of distances, relative to the median norm: among near copies a small difference is no evidence."""


def product_gram(updates: Sequence[LoraTensors]) -> Matrix:
    """<dW_i, dW_j> over all modules, float64 [N, N], scales included; raises MergeError for modules that do not fit.

    tr((B_i A_i)^T B_j A_j) = sum((A_i A_j^T) * (B_i^T B_j)): cost O((in + out) K^2) per module for a summed rank K.
    """
    total = np.zeros((len(updates), len(updates)))
    for name in sorted({name for tensors in updates for name in tensors.modules}):
        owners = [i for i, tensors in enumerate(updates) if name in tensors.modules and tensors.modules[name].rank]
        modules = [updates[i].modules[name] for i in owners]
        if not modules:
            continue
        for module in modules:
            check_module(name, module, like=(modules[0].B.shape[0], modules[0].A.shape[1]))
        scale = np.concatenate([np.full(module.rank, module.scale) for module in modules])
        products = gram(np.concatenate([module.A for module in modules]), axis=1)
        products *= gram(np.concatenate([module.B for module in modules], axis=1), axis=0)
        products *= np.outer(scale, scale)
        starts = np.cumsum([0, *(module.rank for module in modules[:-1])])
        total[np.ix_(owners, owners)] += np.add.reduceat(np.add.reduceat(products, starts, 0), starts, 1)
    return total


def clip_norms(gram: Matrix, limit: float | None = None) -> Matrix:
    """Factors for the weights, float64 [N], that bring every norm to at most `limit` (the median norm when None)."""
    norms = np.sqrt(np.maximum(np.diag(gram), 0.0))
    if limit is None:
        limit = float(np.median(norms)) if norms.size else 0.0
    if not limit >= 0:
        raise MergeError(f"Limit of the norm is {limit}; expected zero or more.")
    return np.where(norms > limit, limit / np.maximum(norms, np.finfo(np.float64).tiny), 1.0)


def keep_near(gram: Matrix, threshold: float = MAD_THRESHOLD) -> list[int]:
    """Indices without the distance outliers: those whose median distance to the others is far above the others'.

    Far: `threshold` times 1.4826 MAD above the median. Fewer than four increments are all kept: no majority could tell.
    """
    count = gram.shape[0]
    if count < 4:
        return list(range(count))
    others = ~np.eye(count, dtype=bool)
    typical = np.median(np.sqrt(_squared_distances(gram))[others].reshape(count, count - 1), axis=1)
    middle = float(np.median(typical))
    spread = 1.4826 * float(np.median(np.abs(typical - middle)))
    spread = max(spread, SPREAD_FLOOR * float(np.median(np.sqrt(np.maximum(np.diag(gram), 0.0)))))
    return [int(i) for i in np.flatnonzero(typical <= middle + threshold * spread)]


def multi_krum(gram: Matrix, malicious: int, keep: int | None = None) -> list[int]:
    """Indices of the `keep` (N - malicious when None) best by Krum's score, ties by the lower index.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017, section 3: the score of i is the sum of its
    N - f - 2 smallest squared distances to others. Raises MergeError unless N >= 2 f + 3, which its guarantee needs.
    """
    count = gram.shape[0]
    if malicious < 0 or count < 2 * malicious + 3:
        raise MergeError(
            f"Krum was asked to stand {malicious} malicious of {count} increments; it needs at least "
            f"{2 * max(malicious, 0) + 3}. Wait for more updates or lower the number."
        )
    keep = count - malicious if keep is None else keep
    if not 1 <= keep <= count:
        raise MergeError(f"Krum was asked to keep {keep} of {count} increments; expected 1 to {count}.")
    distances = _squared_distances(gram)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, : count - malicious - 2].sum(axis=1)
    return sorted(int(i) for i in np.argsort(scores, kind="stable")[:keep])


def _squared_distances(gram: Matrix) -> Matrix:
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
