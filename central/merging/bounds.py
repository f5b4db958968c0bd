"""How large an increment's parts may be, so that no merge rule overflows on them.

In: a module's scale and the norms of its factors. Out: what is too large, in words. Pure.

The norm of the product says nothing of its parts: a scale of 1e70 with factors of 1e-40 has a small
one. But strategies that average factors compute with each part alone, in float32, and so do squares
of them (distances, second moments). These bounds leave 1e20 and more to the limits of float32. A
trained adapter stays far below them: ||A||_F is about sqrt(rank / 3). They are no settings: a plan
that is merged again years later must meet the same bounds.
"""

from __future__ import annotations

import math

import numpy as np

from protos.lora import LoraModule, LoraTensors
from protos.rounding import Array

MAX_SCALE = 1e4
"""Largest |scale| of a module; alpha / rank is 1 or 2 in most recipes. Its sign is free."""
MAX_FACTOR_NORM = 1e4
"""Largest Frobenius norm of A, and of B."""
LEAST_NORM = 1e-12
"""An update whose modules all have a smaller increment changes no weight.

A float32 next to 1e-3 is off by 6e-11. Such an update would still count as a vote, and Krum would
choose it, because zero is near to everybody.
"""
EMPTY = (
    f"Every module has an increment of norm {LEAST_NORM:g} or less; expected at least one that "
    "changes a weight."
)


def excess(module: str, scale: float, norm_a: float, norm_b: float) -> str:
    """What of the module is out of bounds, with the value and the bound; empty when nothing is."""
    if not abs(scale) <= MAX_SCALE:  # also when it is NaN
        return (
            f"Module {module!r} has scale {scale:g}; expected at most {MAX_SCALE:g}, of either "
            "sign."
        )
    for factor, norm in (("A", norm_a), ("B", norm_b)):
        if not norm <= MAX_FACTOR_NORM:
            return (
                f"Module {module!r} has factor {factor} of Frobenius norm {norm:g}; expected at "
                f"most {MAX_FACTOR_NORM:g}."
            )
    return ""


def excess_of(tensors: LoraTensors) -> str:
    """The same of the first module, by name, that is out of bounds; also when all are zero."""
    largest = 0.0
    for name in sorted(tensors.modules):
        module: LoraModule = tensors.modules[name]
        norm_a, norm_b = frobenius(module.A), frobenius(module.B)
        if text := excess(name, module.scale, norm_a, norm_b):
            return text
        largest = max(largest, abs(module.scale) * norm_a * norm_b)
    return "" if largest > LEAST_NORM else EMPTY


def frobenius(factor: Array) -> float:
    """The norm, summed in float64 so that no square is lost; NaN or infinite where a value is."""
    flat = factor.ravel()
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for begin in range(0, flat.size, _SLICE):
            values = flat[begin : begin + _SLICE].astype(np.float64)
            total += float(np.einsum("i,i->", values, values))
    return math.sqrt(total)


_SLICE = 1 << 20
"""Values converted at a time: 8 MiB."""
