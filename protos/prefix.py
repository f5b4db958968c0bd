"""Shorter prefixes of a release, for nodes with less room: one release serves every rank.

In: a release's factors as central's merge makes them, `B sqrt(S)` and `sqrt(S) A` with singular
values S in descending order. Out: the first r pairs of every module and the relative error of
leaving out the rest. By Eckart and Young the prefix is the best approximation of that rank, so no
second truncation is needed and a node cuts the payload whose signature and digest it checked. Both
sides must agree to the byte: an update names the prefix that it was trained on, and central may
have to build it again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protos.lora import LoraCodecError, LoraModule, LoraTensors

TOLERANCE = 1e-3
"""How far float32 factors may be from orthogonal and ordered, relative to their lengths."""


@dataclass(frozen=True)
class Prefix:
    """tensors: at most the rank asked for.

    error: ||release - prefix||_F / ||release||_F over all modules, 6 digits.
    """

    tensors: LoraTensors
    error: float


def prefix(release: LoraTensors, rank: int) -> Prefix:
    """The first `rank` pairs of every module.

    Raises LoraCodecError for a rank below 1 and for factors that are not in the form of a release
    (an update, for example).
    """
    if rank < 1:
        raise LoraCodecError(f"Rank of a prefix is {rank}; expected at least 1.")
    modules: dict[str, LoraModule] = {}
    total = cut = 0.0
    for name in sorted(release.modules):
        module = release.modules[name]
        squares = _squared_singular_values(name, module)
        total, cut = total + float(squares.sum()), cut + float(squares[rank:].sum())
        modules[name] = LoraModule(
            np.ascontiguousarray(module.A[:rank]),
            np.ascontiguousarray(module.B[:, :rank]),
            module.scale,
        )
    return Prefix(
        LoraTensors(modules), float(f"{math.sqrt(cut / total) if total > 0 else 0.0:.6g}")
    )


def _squared_singular_values(name: str, module: LoraModule) -> npt.NDArray[np.float64]:
    """Squares of a module's singular values, float64 [rank].

    Raises LoraCodecError unless its pairs are singular pairs.
    """
    a, b = module.A.astype(np.float64), module.B.astype(np.float64)
    grams = (a @ a.T, b.T @ b)
    norms = [np.sqrt(np.diag(gram)) for gram in grams]
    lengths = norms[0] * norms[1]
    askew = max(
        float(
            np.max(
                np.abs(gram - np.diag(norm**2)) / np.maximum(np.outer(norm, norm), 1e-300),
                initial=0.0,
            )
        )
        for gram, norm in zip(grams, norms, strict=True)
    )
    unordered = bool((lengths[1:] > lengths[:-1] * (1 + TOLERANCE)).any())
    if not askew <= TOLERANCE or unordered:
        raise LoraCodecError(
            f"Module {name!r} is not in the form of a release (its pairs are "
            f"{'out of order' if askew <= TOLERANCE else 'not orthogonal'}); expected singular "
            "pairs in descending order. Only a release has prefixes."
        )
    return np.asarray(np.square(module.scale * lengths))
