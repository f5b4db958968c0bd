"""The rule that chooses a kernel, and the kernels above the exact limit against a dense float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import Kernel, ProductSum, choose_kernel
from central.merging.range_finder import truncate_randomized
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central.merging.lora_factors import best_of_rank, dense

OUT, IN, RANK = 96, 80, 6


@pytest.mark.parametrize(
    ("summed", "rank", "streamed", "expected"),
    [
        (512, 16, True, Kernel.EXACT),
        (512, 16, False, Kernel.EXACT),
        (513, 16, True, Kernel.FOLD),
        (513, 16, False, Kernel.RANDOMIZED),
        (1024, 128, True, Kernel.EXACT),
        (1025, 128, True, Kernel.FOLD),
    ],
)
def test_one_rule_chooses_the_kernel(summed, rank, streamed, expected):
    assert choose_kernel(summed, rank, streamed=streamed) is expected


def make_environments(count: int, seed: int = 0) -> list[LoraTensors]:
    """Updates of rank 8 that share 3 directions; of 8 environments, in order, each adds 3 of its own; 2 are noise."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((OUT, 3)), rng.standard_normal((3, IN))
    environments = [(rng.standard_normal((OUT, 3)), rng.standard_normal((3, IN))) for _ in range(8)]
    updates = []
    for index in range(count):
        own = environments[index * 8 // count]
        B = np.concatenate([shared[0], own[0], 0.5 * rng.standard_normal((OUT, 2))], axis=1)
        A = np.concatenate([shared[1], own[1], rng.standard_normal((2, IN))])
        B += 0.3 * rng.standard_normal(B.shape)
        updates.append(LoraTensors({"m": LoraModule(A.astype(np.float32), B.astype(np.float32), 0.5)}))
    return updates


def combine(updates: list[LoraTensors], weights: list[float], **kernel):
    total = ProductSum(rank=RANK, seed=3, **kernel)
    for tensors, weight in zip(updates, weights, strict=True):
        total.add(tensors, weight)
    return total.result()


@pytest.mark.parametrize(
    ("kernel", "bound"),
    [({"streamed": False}, 1.006), ({"streamed": True}, 1.013), ({"streamed": True, "exact_rank": 64}, 1.02)],
    ids=["randomized", "fold", "small-fold"],
)
def test_above_the_limit_the_error_stays_near_the_optimum(kernel, bound):
    updates = make_environments(200)
    weights = [1 / 200] * 200
    merged = combine(updates, weights, **kernel)
    full = sum(w * dense(u, "m") for u, w in zip(updates, weights, strict=True))
    _, optimum = best_of_rank(full, RANK)
    error = np.linalg.norm(full - dense(merged.tensors, "m"))
    assert optimum * (1 - 1e-9) <= error <= bound * optimum
    assert merged.truncation_error == pytest.approx(error / np.linalg.norm(full), rel=0.3)
    assert merged.tensors.rank == RANK
    again = combine(updates, weights, **kernel)
    assert encode(again.tensors) == encode(merged.tensors)
    assert again.truncation_error == merged.truncation_error


def test_held_terms_below_the_limit_are_the_same_bytes_as_streamed_ones():
    updates, weights = make_environments(20), [0.05] * 20
    held, streamed = (combine(updates, weights, streamed=streamed) for streamed in (False, True))
    assert encode(held.tensors) == encode(streamed.tensors)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), terms=st.integers(2, 40), rank=st.integers(1, 12))
def test_range_finder_finds_what_has_a_low_rank(seed, terms, rank):
    rng = np.random.default_rng(seed)
    true = rng.integers(1, 5)
    mix = rng.standard_normal((terms, true)), rng.standard_normal((true, terms))
    A = (mix[0] @ rng.standard_normal((true, IN))).astype(np.float32)
    B = (rng.standard_normal((OUT, true)) @ mix[1]).astype(np.float32)
    d = rng.uniform(-1, 1, terms)
    found = truncate_randomized(A, B, d, rank, np.random.default_rng(0))
    full = B.astype(np.float64) @ (d[:, None] * A)
    _, optimum = best_of_rank(full, rank)
    size = float(np.sum(np.abs(d) * np.linalg.norm(A, axis=1) * np.linalg.norm(B, axis=0)))
    assert found.A.shape[0] <= min(rank, true)
    assert np.linalg.norm(full - found.B.astype(np.float64) @ found.A) <= optimum + 2e-6 * size
    assert (found.A[np.arange(found.A.shape[0]), np.argmax(np.abs(found.A), axis=1)] > 0).all()


def test_range_finder_survives_removals_and_nothing():
    updates = make_environments(40)
    small = LoraTensors({"m": LoraModule(np.ones((1, IN), np.float32), np.full((OUT, 1), 1e-3, np.float32))})
    merged = combine([*updates, small, *updates], [1.0] * 41 + [-1.0] * 40, streamed=False)
    assert np.linalg.norm(dense(merged.tensors, "m") - dense(small, "m")) < 1e-3 * np.linalg.norm(dense(small, "m"))
    nothing = combine([*updates, *updates], [1.0] * 40 + [-1.0] * 40, streamed=False)
    assert nothing.tensors.modules == {}
