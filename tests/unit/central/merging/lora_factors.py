"""Builders and the dense float64 oracle of the merging tests."""

from __future__ import annotations

import numpy as np

from protos.lora import LoraModule, LoraTensors

OUT, IN = 24, 20
NAMES = ("layers.0.q", "layers.0.v", "layers.1.up")


def make_update(
    seed: int, rank: int = 4, names: tuple[str, ...] = NAMES, scale: float = 2.0
) -> LoraTensors:
    rng = np.random.default_rng(seed)
    return LoraTensors(
        {
            name: LoraModule(
                rng.standard_normal((rank, IN)).astype(np.float32),
                (0.05 * rng.standard_normal((OUT, rank))).astype(np.float32),
                scale,
            )
            for name in names
        }
    )


def rotate(update: LoraTensors, seed: int, spread: float = 0.3) -> LoraTensors:
    """The same product in other factors: A -> T A, B -> B T^-1."""
    rng = np.random.default_rng([seed, 1])
    modules = {}
    for name, m in update.modules.items():
        T = np.eye(m.rank) + spread * rng.standard_normal((m.rank, m.rank))
        if np.linalg.cond(T) > 50:
            T = np.eye(m.rank) * 3
        modules[name] = LoraModule(
            (T @ m.A).astype(np.float32), (m.B @ np.linalg.inv(T)).astype(np.float32), m.scale
        )
    return LoraTensors(modules)


def dense(tensors: LoraTensors, name: str, shape: tuple[int, int] = (OUT, IN)) -> np.ndarray:
    if name not in tensors.modules:
        return np.zeros(shape)
    module = tensors.modules[name]
    return module.scale * (module.B.astype(np.float64) @ module.A.astype(np.float64))


def best_of_rank(m: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Optimal truncation by a dense float64 SVD, and the norm of what it leaves out."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], float(np.sqrt(np.sum(s[rank:] ** 2)))
