"""Distances of releases against the dense products."""

from __future__ import annotations

import numpy as np
import pytest

from central.releases.difference import ModuleDifference, module_differences
from protos.lora import LoraModule, LoraTensors


def make_module(seed: int, rank: int = 3, scale: float = 1.0) -> LoraModule:
    rng = np.random.default_rng(seed)
    return LoraModule(
        rng.standard_normal((rank, 20), np.float32),
        rng.standard_normal((4, rank), np.float32),
        scale,
    )


def dense(module: LoraModule) -> np.ndarray:
    return module.scale * module.B.astype(np.float64) @ module.A.astype(np.float64)


def test_norms_are_those_of_the_dense_products() -> None:
    old, new = make_module(1, rank=7), make_module(2, rank=2, scale=0.5)
    (found,) = module_differences(LoraTensors({"q": old}), LoraTensors({"q": new}))
    expected = [
        np.linalg.norm(matrix) for matrix in (dense(old), dense(new), dense(new) - dense(old))
    ]
    assert (found.norm_a, found.norm_b, found.change) == pytest.approx(expected, rel=1e-12)


def test_a_change_far_below_the_norm_is_seen_and_another_split_is_none() -> None:
    old = make_module(1)
    A = old.A.copy()
    A[0, 0] *= np.float32(1 + 1e-6)
    new = LoraModule(A, old.B)
    (found,) = module_differences(LoraTensors({"q": old}), LoraTensors({"q": new}))
    assert found.change == pytest.approx(np.linalg.norm(dense(new) - dense(old)), rel=1e-6)
    assert 0 < found.change < 1e-6 * found.norm_a
    turned = LoraModule(old.A * np.float32(2), old.B * np.float32(0.5))
    (same,) = module_differences(LoraTensors({"q": old}), LoraTensors({"q": turned}))
    assert same.change < 1e-14 * same.norm_a


def test_a_module_that_one_side_lacks_is_zero_there() -> None:
    module = make_module(1)
    norm = pytest.approx(np.linalg.norm(dense(module)))
    assert module_differences(LoraTensors({"q": module}), LoraTensors({"v": module})) == [
        ModuleDifference("q", norm, 0.0, norm),  # type: ignore[arg-type]
        ModuleDifference("v", 0.0, norm, norm),  # type: ignore[arg-type]
    ]
