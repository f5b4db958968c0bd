"""Shorter prefixes of a release, for nodes with less room (nested, so that one release serves every rank).

In: a release's factors as this room makes them, `B sqrt(S)` and `sqrt(S) A` with singular values S in descending order.
Out: the first r pairs of every module and the relative error of leaving out the rest. By Eckart and Young the prefix is the best
approximation of that rank, so no second truncation is needed and a node may cut the bytes it has by itself.
"""

from __future__ import annotations

import math

import numpy as np

from central.merging.errors import MergeError
from central.merging.gram import Matrix, gram
from central.merging.product import Merged
from protos.lora import LoraModule, LoraTensors

TOLERANCE = 1e-3
"""How far float32 factors may be from orthogonal and ordered, relative to their lengths."""


def prefix(tensors: LoraTensors, rank: int) -> Merged:
    """The first `rank` pairs of every module, and ||release - prefix||_F / ||release||_F over all modules (6 digits).

    Raises MergeError for a rank below 1 and for factors that are not in the form of a release (an update, for example).
    """
    if rank < 1:
        raise MergeError(f"Rank of a prefix is {rank}; expected at least 1.")
    modules: dict[str, LoraModule] = {}
    total = cut = 0.0
    for name in sorted(tensors.modules):
        module = tensors.modules[name]
        squares = _squared_singular_values(name, module)
        total, cut = total + float(squares.sum()), cut + float(squares[rank:].sum())
        modules[name] = LoraModule(
            np.ascontiguousarray(module.A[:rank]), np.ascontiguousarray(module.B[:, :rank]), module.scale
        )
    return Merged(LoraTensors(modules), float(f"{math.sqrt(cut / total) if total > 0 else 0.0:.6g}"))


def _squared_singular_values(name: str, module: LoraModule) -> Matrix:
    """Squares of a module's singular values, float64 [rank]; raises MergeError unless its pairs are singular pairs."""
    gram_a, gram_b = gram(module.A, axis=1), gram(module.B, axis=0)
    norm_a, norm_b = np.sqrt(np.diag(gram_a)), np.sqrt(np.diag(gram_b))
    lengths = norm_a * norm_b
    askew = max(
        float(np.max(np.abs(products - np.diag(norms**2)) / np.maximum(np.outer(norms, norms), 1e-300), initial=0.0))
        for products, norms in ((gram_a, norm_a), (gram_b, norm_b))
    )
    unordered = bool((lengths[1:] > lengths[:-1] * (1 + TOLERANCE)).any())
    if not askew <= TOLERANCE or unordered:
        raise MergeError(
            f"Module {name!r} is not in the form of a release (its pairs are {'out of order' if askew <= TOLERANCE else 'not orthogonal'}); "
            "expected singular pairs in descending order. Merge the factors first.",
            name,
        )
    return np.asarray(np.square(module.scale * lengths))
