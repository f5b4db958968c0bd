"""Gradient-weighted RegMean in factor form: the combination that fits every node's own inputs best.

In: increments with weights and, per module, a sketch of G_i = sum_t |g_t|^2 x_t x_t^T (x: a module's input, g: the loss
gradient at its output) as a section of the update: `gram/<module>` with `U` float32 [in_features, k] and `c`, one number,
for G_i = c I + U U^T. Out: the combination's factors, an increment like any other, for the same truncation:

    dW = (sum_i w_i dW_i G_i) (sum_i w_i G_i)^-1 = sum_i B_i Atilde_i

RegMean (Jin et al., arXiv:2212.09849, equation 2) with gradient weights; sketches are divided by their mean diagonal, so that no
node gains weight by claiming a large one, and eps I is added to each, so that a large eps is the weighted product mean.
With sum_i w_i G_i = c I + V V^T (V: the U_i side by side), Woodbury's identity leaves one small solve:

    (c I + V V^T)^-1 = (I - V (c I + V^T V)^-1 V^T) / c

A module without a sketch counts as isotropic, G_i = (1 + eps) I. A module without an increment counts as dW_i = 0 under its
G_i, as a fresh LoRA is zero; so an entry of sketches alone pulls towards the parent on its inputs: with weight 0.3 beside weights that
sum to 1 this is a retention Gram, and with another node's latest sketches it is the asynchronous rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from central.merging.errors import MergeError
from central.merging.gram import Matrix
from central.merging.module_sum import check_module
from protos.lora import Array, LoraModule, LoraTensors

SECTION = "gram/"
"""Name of a module's section, before the module's name."""


def regmean(updates: Sequence[tuple[LoraTensors, float]], *, eps: float = 0.1) -> LoraTensors:
    """The combination of (increment, weight), at scale 1.0 and of the increments' summed rank; not truncated.

    Hand the result to `ProductSum(streamed=False).add`. Holds one module in float64 at a time. eps is the safety knob: 0.1 is
    what was measured, 1e-3 destroyed base skill, 0.3 to 1 kept more of it. Raises MergeError for a sketch that is none, for factors that do not fit, and
    for negative weights: to remove an increment under this rule, solve again without it.
    """
    weights = [weight for _, weight in updates]
    if not math.isfinite(eps) or eps <= 0:
        raise MergeError(f"eps of RegMean is {eps}; expected a number above zero, 0.1 for example.")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise MergeError(f"Weights of RegMean are {weights}; expected none below zero: solve without what is removed.")
    if updates and sum(weights) == 0:
        raise MergeError(f"All {len(weights)} weights of RegMean are zero; expected a sum above zero.")
    counted = [(tensors, weight) for tensors, weight in updates if weight > 0]
    names = sorted({name for tensors, _ in counted for name, module in tensors.modules.items() if module.rank})
    return LoraTensors({name: _combine(name, counted, eps) for name in names})


def check_sketches(tensors: LoraTensors) -> None:
    """Raises MergeError for factors or sketches of one entry that no merge could use."""
    for name, module in tensors.modules.items():
        check_module(name, module, like=None)
        _read(name, tensors, module.A.shape[1], 0.0)


@dataclass(frozen=True)
class _Sketch:
    """G = c I + U U^T, regularised: c float, U float64 [in_features, k]."""

    c: float
    U: Matrix


def _combine(name: str, updates: Sequence[tuple[LoraTensors, float]], eps: float) -> LoraModule:
    """`sum_i B_i Atilde_i` of one module: A float32 [K, in], B float32 [out, K]."""
    owners = [tensors.modules[name] for tensors, _ in updates if name in tensors.modules]
    features = (owners[0].B.shape[0], owners[0].A.shape[1])
    rows: list[Matrix] = []
    columns: list[Matrix] = []
    isotropic = 0.0
    for tensors, weight in updates:
        sketch = _read(name, tensors, features[1], eps)
        isotropic += weight * sketch.c
        columns.append(math.sqrt(weight) * sketch.U)
        if (module := tensors.modules.get(name)) is not None:
            check_module(name, module, like=features)
            A = module.A.astype(np.float64)
            rows.append(weight * module.scale * (sketch.c * A + (A @ sketch.U) @ sketch.U.T))
    X, V = np.concatenate(rows), np.concatenate(columns, axis=1)
    inner = V.T @ V
    inner[np.diag_indices_from(inner)] += isotropic
    solved = (X - np.linalg.solve(inner, (X @ V).T).T @ V.T) / isotropic
    B = np.concatenate([module.B for module in owners], axis=1)
    return LoraModule(np.ascontiguousarray(solved.astype(np.float32)), np.ascontiguousarray(B))


def _read(name: str, tensors: LoraTensors, in_features: int, eps: float) -> _Sketch:
    """The sketch of one module, divided by its mean diagonal, plus eps I; raises MergeError for one that is none."""
    section = tensors.sections.get(SECTION + name)
    if section is None:
        return _Sketch(1.0 + eps, np.zeros((in_features, 0)))
    if set(section) != {"U", "c"}:
        raise MergeError(f"Section {SECTION + name!r} holds {sorted(section)}; expected U and c.", name)
    U, c = _floats(name, "U", section["U"]), _floats(name, "c", section["c"])
    if U.ndim != 2 or U.shape[0] != in_features or c.size != 1:
        raise MergeError(
            f"Section {SECTION + name!r} has shapes U {U.shape}, c {c.shape}; expected [{in_features}, k] and one number.",
            name,
        )
    isotropic = float(c.reshape(()))
    mean_diagonal = isotropic + float(np.sum(U.astype(np.float64) ** 2)) / in_features
    if isotropic < 0 or mean_diagonal <= 0:
        raise MergeError(
            f"Section {SECTION + name!r} has c {isotropic} and a mean diagonal of {mean_diagonal}; expected c of zero or "
            "more and a Gram that is not zero.",
            name,
        )
    return _Sketch(isotropic / mean_diagonal + eps, U.astype(np.float64) / math.sqrt(mean_diagonal))


def _floats(name: str, key: str, array: npt.NDArray[np.generic]) -> Array:
    """`array` when it is finite float32; raises MergeError otherwise."""
    if array.dtype != np.float32 or not np.isfinite(array).all():
        raise MergeError(
            f"Section {SECTION + name!r} has {key} of dtype {array.dtype} or with NaN or infinity; expected finite float32.",
            name,
        )
    return array.astype(np.float32, copy=False)
