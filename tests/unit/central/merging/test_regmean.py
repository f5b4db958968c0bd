"""Gradient-weighted RegMean in factor form against the dense float64 solve."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import ProductSum, merge, regmean
from central.merging.errors import MergeError
from protos.lora import LoraTensors, decode, encode
from tests.unit.central.merging.lora_factors import IN, NAMES, best_of_rank, dense, make_update


def make_sketched(seed: int, rank: int = 4, columns: int = 3, names: tuple[str, ...] = NAMES) -> LoraTensors:
    """An update whose Grams have a few strong directions, of any overall size."""
    rng = np.random.default_rng([seed, 5])
    sections = {
        f"gram/{name}": {
            "U": (10.0 ** rng.uniform(-3, 3) * rng.standard_normal((IN, columns)) * 3).astype(np.float32),
            "c": np.asarray(rng.uniform(0, 2), np.float32),
        }
        for name in names
    }
    return LoraTensors(make_update(seed, rank, names).modules, sections)


def dense_gram(update: LoraTensors, name: str, eps: float) -> np.ndarray:
    section = update.sections.get(f"gram/{name}")
    if section is None:
        return (1 + eps) * np.eye(IN)
    U = section["U"].astype(np.float64)
    G = float(section["c"]) * np.eye(IN) + U @ U.T
    return G / np.mean(np.diag(G)) + eps * np.eye(IN)


def dense_regmean(updates: list[tuple[LoraTensors, float]], name: str, eps: float) -> np.ndarray:
    grams = [w * dense_gram(u, name, eps) for u, w in updates]
    pulled = sum(dense(u, name) @ G for (u, _), G in zip(updates, grams, strict=True))
    return np.linalg.solve(sum(grams).T, pulled.T).T


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=5, unique=True),
    ranks=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    columns=st.lists(st.integers(0, 12), min_size=5, max_size=5),
    weights=st.lists(st.floats(0.01, 2.0), min_size=5, max_size=5),
    eps=st.sampled_from([1e-3, 0.1, 1.0]),
    missing=st.sampled_from(NAMES),
)
def test_equals_the_dense_solve(seeds, ranks, columns, weights, eps, missing):
    updates = []
    for index, seed in enumerate(seeds):
        update = make_sketched(seed, ranks[index], columns[index])
        if columns[index] == 0:  # without directions, c alone must not be zero
            update = LoraTensors(update.modules, {})
        if index == 1:
            update = LoraTensors({n: m for n, m in update.modules.items() if n != missing}, update.sections)
        updates.append((update, weights[index]))
    combined = regmean([(decode(encode(u)), w) for u, w in updates], eps=eps)
    for name in NAMES:
        expected = dense_regmean(updates, name, eps)
        size = max(np.linalg.norm(expected), max(np.linalg.norm(dense(u, name)) for u, _ in updates))
        assert np.linalg.norm(dense(combined, name) - expected) < 1e-6 * size
        assert combined.modules[name].scale == 1.0


def test_large_eps_and_no_sketches_are_the_product_mean():
    updates = [(make_sketched(seed), 0.25) for seed in range(4)]
    plain = [(LoraTensors(u.modules), w) for u, w in updates]
    for combined in (regmean(updates, eps=1e7), regmean(plain, eps=0.1)):
        for name in NAMES:
            mean = sum(w * dense(u, name) for u, w in updates)
            assert np.linalg.norm(dense(combined, name) - mean) < 2e-6 * np.linalg.norm(mean)


def test_a_larger_claimed_gram_gains_nothing():
    updates = [(make_sketched(seed), 0.5) for seed in range(2)]
    louder = {
        name: {"U": section["U"] * np.float32(1e3), "c": section["c"] * np.float32(1e6)}
        for name, section in updates[0][0].sections.items()
    }
    combined, loud = regmean(updates), regmean([(LoraTensors(updates[0][0].modules, louder), 0.5), updates[1]])
    for name in NAMES:
        np.testing.assert_allclose(dense(loud, name), dense(combined, name), atol=1e-5)


def test_sketches_alone_pull_towards_the_parent():
    update = make_sketched(1)
    kept = LoraTensors({}, update.sections)
    alone, held = regmean([(update, 1.0)]), regmean([(update, 1.0), (kept, 1.0)])
    for name in NAMES:
        np.testing.assert_allclose(dense(alone, name), dense(update, name), atol=1e-5)
        np.testing.assert_allclose(dense(held, name), dense(update, name) / 2, atol=1e-5)


@pytest.mark.parametrize(("U", "c"), [(3e38, 0.0), (3e38, 3e38), (1e-30, 0.0), (0.0, 1e-38), (0.0, 3e38)])
def test_any_admitted_size_of_a_sketch_is_solved(U, c):
    # U of rank one in one direction: the most that a lying node can claim. It weighs in - in that direction - and breaks nothing.
    name = NAMES[0]
    section = {"U": np.zeros((IN, 1), np.float32), "c": np.asarray(c, np.float32)}
    section["U"][0] = U
    liar = LoraTensors(make_update(1, names=(name,)).modules, {f"gram/{name}": section})
    honest = make_sketched(2, names=(name,))
    combined = regmean([(liar, 0.5), (honest, 0.5)])
    expected = dense_regmean([(liar, 0.5), (honest, 0.5)], name, 0.1)
    np.testing.assert_allclose(dense(combined, name), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("count", [6, 150])
def test_goes_into_the_same_truncation(count):
    # 150 x 4 directions are above the exact limit: the held factors go through the range finder.
    updates = [(make_sketched(seed, names=NAMES[:1]), 1 / count) for seed in range(count)]
    parent = merge(LoraTensors(), [(make_update(99, names=NAMES[:1]), 1.0)], rank=4, server_step=1.0, seed=0).tensors
    total = ProductSum(rank=4, seed=0, streamed=False)
    total.add(parent, 1.0)
    total.add(regmean(updates), 2.0)
    merged = total.result()
    full = dense(parent, NAMES[0]) + 2.0 * dense_regmean(updates, NAMES[0], 0.1)
    _, optimum = best_of_rank(full, 4)
    assert np.linalg.norm(full - dense(merged.tensors, NAMES[0])) <= 1.006 * optimum
    assert merged.truncation_error == pytest.approx(optimum / np.linalg.norm(full), rel=0.3)


def with_section(**section: object) -> LoraTensors:
    update = make_sketched(0, names=NAMES[:1])
    return LoraTensors(update.modules, {f"gram/{NAMES[0]}": {**update.sections[f"gram/{NAMES[0]}"], **section}})


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (with_section(U=np.ones((IN + 1, 2), np.float32)), r"expected \[20, k\]"),
        (with_section(c=np.ones(2, np.float32)), "one number"),
        (with_section(c=np.asarray(-1.0, np.float32)), "c of zero or"),
        (with_section(c=np.asarray(np.nan, np.float32)), "NaN"),
        (with_section(U=np.ones((IN, 2))), "float64"),
        (with_section(U=np.zeros((IN, 2), np.float32), c=np.asarray(0, np.float32)), "not zero"),
        (with_section(extra=np.ones(1, np.float32)), "expected U and c"),
    ],
)
def test_a_sketch_that_is_none_is_refused(update, message):
    with pytest.raises(MergeError, match=message) as caught:
        regmean([(update, 1.0)])
    assert caught.value.module == NAMES[0]


def test_weights_and_eps_that_cannot_be_solved_are_refused():
    update = make_sketched(0)
    with pytest.raises(MergeError, match="solve without"):
        regmean([(update, 1.0), (update, -0.5)])
    with pytest.raises(MergeError, match="zero"):
        regmean([(update, 0.0)])
    with pytest.raises(MergeError, match="eps"):
        regmean([(update, 1.0)], eps=0.0)
    assert regmean([]).modules == {}
