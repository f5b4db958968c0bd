"""How far two releases are apart, in product space.

In: two releases' factors. Out: per module ||P_A||, ||P_B|| and ||P_B - P_A|| (Frobenius). The
product is never built: with B = Q_B R_B and A^T = Q_A R_A, ||B A|| = ||R_B R_A^T||, and a
difference is one product of stacked factors. QR and not Grams, because Grams would lose differences
below 1e-8 of the norms. Cost O((in + out) (r_A + r_B)^2) a module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from protos.lora import LoraModule, LoraTensors


@dataclass(frozen=True)
class ModuleDifference:
    """Frobenius norms; a module that a release lacks is zero there."""

    module: str
    norm_a: float
    norm_b: float
    change: float


def module_differences(a: LoraTensors, b: LoraTensors) -> list[ModuleDifference]:
    """One entry per module of either release, by name."""
    found = []
    for name in sorted(a.modules.keys() | b.modules.keys()):
        first = [(module, 1.0) for module in (a.modules.get(name),) if module is not None]
        second = [(module, 1.0) for module in (b.modules.get(name),) if module is not None]
        apart = [*second, *((module, -1.0) for module, _ in first)]
        found.append(ModuleDifference(name, _norm(first), _norm(second), _norm(apart)))
    return found


def _norm(terms: list[tuple[LoraModule, float]]) -> float:
    """||sum of sign * scale * B A||_F."""
    if not terms:
        return 0.0
    B = np.hstack([sign * module.scale * module.B.astype(np.float64) for module, sign in terms])
    At = np.hstack([module.A.T.astype(np.float64) for module, _ in terms])
    R_b, R_a = np.asarray(np.linalg.qr(B, mode="r")), np.asarray(np.linalg.qr(At, mode="r"))
    return float(np.linalg.norm(R_b @ R_a.T))
