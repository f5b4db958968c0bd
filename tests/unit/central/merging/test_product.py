"""Merging against a dense float64 oracle: the truncated sum of products is the law, whatever the
factors look like.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import Merged, merge
from central.merging.errors import MergeError
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central.merging.lora_factors import (
    IN,
    NAMES,
    OUT,
    best_of_rank,
    dense,
    make_update,
    rotate,
)


def oracle(parent: LoraTensors, updates: list[tuple[LoraTensors, float]], rank: int, step: float):
    """Optimal truncation per module by a dense float64 SVD, and the relative error over all
    modules.
    """
    best, total, cut = {}, 0.0, 0.0
    for name in NAMES:
        m = dense(parent, name) + step * sum(
            (w * dense(u, name) for u, w in updates), np.zeros((OUT, IN))
        )
        best[name], tail = best_of_rank(m, rank)
        total, cut = total + float(np.sum(m**2)), cut + tail**2
    return best, np.sqrt(cut / total) if total else 0.0


def run(
    parent: LoraTensors, updates: list[tuple[LoraTensors, float]], rank: int = 8, step: float = 1.0
) -> Merged:
    return merge(parent, iter(updates), rank=rank, server_step=step, seed=0)


def assert_same_product(
    left: LoraTensors, right: LoraTensors | dict[str, np.ndarray], tolerance: float = 2e-6
) -> None:
    for name in NAMES:
        expected = right[name] if isinstance(right, dict) else dense(right, name)
        norm = max(float(np.linalg.norm(expected)), 1e-3)
        assert np.linalg.norm(dense(left, name) - expected) / norm < tolerance, name


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=6, unique=True),
    ranks=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    weights=st.lists(st.floats(-1.5, 2.0).filter(lambda w: abs(w) > 0.05), min_size=6, max_size=6),
    missing=st.lists(st.sampled_from(NAMES), min_size=6, max_size=6),
    rank=st.integers(1, 24),
    step=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_agrees_with_dense_oracle(seeds, ranks, weights, missing, rank, step):
    parent = make_update(99_999, rank=5, scale=1.0)
    updates = [
        (make_update(seed, r, tuple(n for n in NAMES if n != m), scale=0.5 + r), w)
        for seed, r, w, m in zip(seeds, ranks, weights, missing, strict=False)
    ]
    merged = run(parent, updates, rank, step)
    expected, error = oracle(parent, updates, rank, step)
    assert merged.tensors.rank <= rank
    assert all(module.scale == 1.0 for module in merged.tensors.modules.values())
    assert list(merged.tensors.modules) == sorted(merged.tensors.modules)
    assert merged.truncation_error == pytest.approx(error, abs=2e-6)
    # A gap-free spectrum lets two optimal truncations differ, so the distance to the full sum is
    # compared, not the matrix.
    full, _ = oracle(parent, updates, min(OUT, IN), step)
    for name in NAMES:
        ours = np.linalg.norm(dense(merged.tensors, name) - full[name])
        best = np.linalg.norm(expected[name] - full[name])
        assert ours <= best + 3e-6 * np.linalg.norm(full[name])


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_order_never_matters(order):
    updates = [(make_update(seed, rank=1 + seed), 0.2) for seed in range(5)]
    straight = run(LoraTensors(), updates)
    shuffled = run(LoraTensors(), [updates[i] for i in order])
    assert_same_product(shuffled.tensors, straight.tensors)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_rotation_of_factors_changes_nothing(seed):
    update = make_update(seed)
    rotated = rotate(update, seed)
    other = (make_update(seed + 1), 0.5)
    straight = run(LoraTensors(), [(update, 0.5), other])
    assert_same_product(
        run(LoraTensors(), [(rotated, 0.5), other]).tensors, straight.tensors, tolerance=2e-5
    )


@pytest.mark.parametrize("count", [1, 3, 60])
def test_copies_return_themselves(count):
    update = make_update(3)
    merged = run(LoraTensors(), [(update, 1 / count)] * count)
    assert_same_product(merged.tensors, update)
    assert merged.truncation_error < 1e-6
    assert merged.tensors.rank == 4


def test_signed_weight_removes_a_contribution():
    kept, gone = make_update(1), make_update(2)
    both = run(LoraTensors(), [(kept, 0.5), (gone, 0.5)])
    removed = run(both.tensors, [(gone, -0.5)])
    assert_same_product(removed.tensors, run(LoraTensors(), [(kept, 0.5)]).tensors)


def test_removing_a_large_update_leaves_a_small_one_intact():
    # With float32 Grams, phantom directions of 3e-4 of the cancelled norm outrank the true
    # increment of 1e-3: error 0.99.
    big, small = make_update(1, rank=8), make_update(2, rank=2, scale=2e-3)
    same = rotate(big, 0, spread=0.1)
    merged = run(LoraTensors(), [(big, 1.0), (small, 1.0), (same, -1.0)], rank=4)
    expected, _ = oracle(LoraTensors(), [(small, 1.0)], 4, 1.0)
    for name in NAMES:
        assert np.linalg.norm(dense(merged.tensors, name) - expected[name]) < 1e-3 * np.linalg.norm(
            expected[name]
        )


def test_same_input_same_bytes():
    updates = [(make_update(seed), 0.25) for seed in range(4)]
    one, two = (run(make_update(9, scale=1.0), updates) for _ in range(2))
    assert encode(one.tensors) == encode(two.tensors)
    for module in one.tensors.modules.values():
        assert (module.A[np.arange(module.rank), np.argmax(np.abs(module.A), axis=1)] > 0).all()


def test_zero_and_rank_deficient_inputs():
    zero = LoraTensors(
        {NAMES[0]: LoraModule(np.ones((4, IN), np.float32), np.zeros((OUT, 4), np.float32))}
    )
    merged = run(LoraTensors(), [(zero, 1.0)])
    assert merged.tensors.modules == {}
    assert merged.truncation_error == 0.0
    assert run(LoraTensors(), []).tensors.modules == {}
    row, column = np.ones((1, IN), np.float32), np.ones((OUT, 1), np.float32)
    deficient = LoraTensors({NAMES[0]: LoraModule(np.repeat(row, 5, 0), np.repeat(column, 5, 1))})
    module = run(zero, [(deficient, 1.0)]).tensors.modules[NAMES[0]]
    assert module.rank == 1
    np.testing.assert_allclose(module.B @ module.A, 5.0, rtol=1e-6)


def test_an_update_minus_itself_is_nothing():
    merged = run(LoraTensors(), [(make_update(1), 1.0), (make_update(1), -1.0)])
    assert merged.tensors.modules == {}
    assert merged.truncation_error == 0.0


def test_many_updates_fold_in_bounded_memory_and_estimate_their_error():
    rng = np.random.default_rng(5)
    common = make_update(1000, rank=6)
    updates = []
    for seed in range(160):
        noise = make_update(seed, rank=2, scale=0.3)
        mixed = {
            name: LoraModule(
                np.concatenate([m.A, noise.modules[name].A]),
                np.concatenate(
                    [m.B * (1 + 0.1 * rng.standard_normal()), 0.15 * noise.modules[name].B], axis=1
                ).astype(np.float32),
                m.scale,
            )
            for name, m in common.modules.items()
        }
        updates.append((LoraTensors(mixed), 1 / 160))
    merged = run(LoraTensors(), updates, rank=4)
    expected, error = oracle(LoraTensors(), updates, 4, 1.0)
    full, _ = oracle(LoraTensors(), updates, min(OUT, IN), 1.0)
    ours = np.sqrt(sum(np.linalg.norm(dense(merged.tensors, n) - full[n]) ** 2 for n in NAMES))
    best = np.sqrt(sum(np.linalg.norm(expected[n] - full[n]) ** 2 for n in NAMES))
    assert ours < 1.02 * best
    assert merged.truncation_error == pytest.approx(error, rel=0.3)
    assert encode(run(LoraTensors(), updates, rank=4).tensors) == encode(merged.tensors)


def test_refuses_what_does_not_fit():
    other = LoraTensors(
        {NAMES[0]: LoraModule(np.ones((2, IN + 1), np.float32), np.ones((OUT, 2), np.float32))}
    )
    with pytest.raises(MergeError, match=r"layers\.0\.q.*expected \[rank, 20\] and \[24, rank\]"):
        run(make_update(0), [(other, 1.0)])
    broken = LoraTensors(
        {NAMES[0]: LoraModule(np.full((2, IN), np.nan, np.float32), np.ones((OUT, 2), np.float32))}
    )
    with pytest.raises(MergeError, match="NaN"):
        run(LoraTensors(), [(broken, 1.0)])
    with pytest.raises(MergeError, match="Weight"):
        run(LoraTensors(), [(make_update(0), float("inf"))])
