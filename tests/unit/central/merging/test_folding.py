"""When terms are folded, and folds against a dense float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

from central.merging import ProductSum
from central.merging.module_sum import ModuleSum
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central.merging.lora_factors import best_of_rank, dense

OUT, IN, RANK = 96, 80, 6


@pytest.mark.parametrize(
    ("exact_rank", "rank", "limit"),
    [(512, 16, 512), (512, 64, 512), (512, 128, 1024), (64, 6, 64), (9, 6, 48)],
)
def test_the_exact_limit_is_the_setting_or_eight_ranks(
    exact_rank: int, rank: int, limit: int
) -> None:
    """A sum of exactly the limit is cut in one exact step; one pair more and it was folded, which
    leaves a probe.
    """
    for summed, folded in ((limit, False), (limit + 1, True)):
        total = ModuleSum("m", rank, 0, exact_rank=exact_rank)
        for size in (limit - 1, summed - limit + 1):
            total.add(
                LoraModule(np.ones((size, 4), np.float32), np.ones((3, size), np.float32)), 1.0
            )
        assert (total._probe is not None) is folded


def make_environments(count: int, seed: int = 0) -> list[LoraTensors]:
    """Updates of rank 8 that share 3 directions; of 8 environments, in order, each adds 3 of its
    own; 2 are noise.
    """
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((OUT, 3)), rng.standard_normal((3, IN))
    environments = [(rng.standard_normal((OUT, 3)), rng.standard_normal((3, IN))) for _ in range(8)]
    updates = []
    for index in range(count):
        own = environments[index * 8 // count]
        B = np.concatenate([shared[0], own[0], 0.5 * rng.standard_normal((OUT, 2))], axis=1)
        A = np.concatenate([shared[1], own[1], rng.standard_normal((2, IN))])
        B += 0.3 * rng.standard_normal(B.shape)
        updates.append(
            LoraTensors({"m": LoraModule(A.astype(np.float32), B.astype(np.float32), 0.5)})
        )
    return updates


def combine(updates: list[LoraTensors], weights: list[float], **kernel):
    total = ProductSum(rank=RANK, seed=3, **kernel)
    for tensors, weight in zip(updates, weights, strict=True):
        total.add(tensors, weight)
    return total.result()


@pytest.mark.parametrize(
    ("kernel", "bound"),
    [({}, 1.013), ({"exact_rank": 64}, 1.02)],
    ids=["fold", "small-fold"],
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


def test_every_seed_and_every_module_has_probes_of_its_own() -> None:
    """Or the errors of all modules, and of all merges, would be estimated wrong alike."""
    factors = make_environments(1)[0].modules["m"]
    estimates = set()
    for name, seed in (("m", 0), ("m", 1), ("m", -1), ("n", 0)):
        total = ModuleSum(name, RANK, seed, exact_rank=1)
        for _ in range(7):  # 56 of at most 48: folded
            total.add(factors, 1.0)
        estimates.add(total.result()[1])
    assert len(estimates) == 4
    exact = 49 * np.sum(dense(make_environments(1)[0], "m") ** 2)
    assert all(estimate == pytest.approx(exact, rel=0.7) for estimate in estimates)
