"""Robust filters judge products: which factors carry an increment never matters."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import clip_norms, keep_near, multi_krum, product_gram
from central.merging.errors import MergeError
from protos.lora import LoraModule, LoraTensors
from tests.unit.central.merging.lora_factors import IN, NAMES, OUT, dense, make_update, rotate

HONEST, ATTACKERS = 8, 2


def make_fleet(seed: int) -> list[LoraTensors]:
    """Honest increments share most of what they learnt; the last ATTACKERS send the opposite, of
    like norm.
    """
    shared = make_update(seed, 3)
    fleet = []
    for index in range(HONEST + ATTACKERS):
        own = make_update(1000 * seed + index, 2)
        sign = 1.0 if index < HONEST else -1.0
        fleet.append(
            LoraTensors(
                {
                    name: LoraModule(
                        np.float32(0.2) * np.concatenate([m.A, own.modules[name].A]),
                        np.float32(5)
                        * np.concatenate(
                            [np.float32(sign) * m.B, np.float32(0.4) * own.modules[name].B], axis=1
                        ),
                        m.scale,
                    )
                    for name, m in shared.modules.items()
                }
            )
        )
    return fleet


def raw_gram(updates: list[LoraTensors]) -> np.ndarray:
    """What a stock Krum sees: inner products of the flattened factors."""
    flat = [
        np.concatenate(
            [np.concatenate([m.A.ravel(), m.B.ravel()]) for m in u.modules.values()]
        ).astype(np.float64)
        for u in updates
    ]
    return np.array([[x @ y for y in flat] for x in flat])


@settings(max_examples=15, deadline=None)
@given(ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5), missing=st.sampled_from(NAMES))
def test_gram_is_the_dense_inner_products(ranks, missing):
    updates = [
        make_update(i, r, tuple(n for n in NAMES if i % 2 or n != missing), 0.5 + i)
        for i, r in enumerate(ranks)
    ]
    flat = [np.concatenate([dense(u, n).ravel() for n in NAMES]) for u in updates]
    expected = np.array([[x @ y for y in flat] for x in flat])
    whole = product_gram(updates)
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    for block in (1, 2, 3):
        np.testing.assert_allclose(
            product_gram(updates, block=block), whole, rtol=1e-9, atol=1e-12 * np.abs(whole).max()
        )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 500))
def test_selections_do_not_depend_on_the_factors(seed):
    fleet = make_fleet(seed)
    rotated = [rotate(update, 17 * seed + i, spread=1.0) for i, update in enumerate(fleet)]
    one, two = product_gram(fleet), product_gram(rotated)
    honest = list(range(HONEST))
    assert multi_krum(one, ATTACKERS).kept == multi_krum(two, ATTACKERS).kept == honest
    assert keep_near(one).kept == keep_near(two).kept == honest
    for selection in (multi_krum(one, ATTACKERS), keep_near(one)):
        assert max(selection.scores[honest]) <= selection.limit < min(selection.scores[HONEST:])
    np.testing.assert_allclose(clip_norms(one), clip_norms(two), rtol=1e-4)


def test_blocks_bound_what_is_held():
    class Counted(Sequence):
        def __init__(self):
            self.held, self.most, self.reads = weakref.WeakSet(), 0, 0

        def __len__(self):
            return 12

        def __getitem__(self, index):
            update = Held(make_update(index).modules)
            self.reads += 1
            self.held.add(update)
            self.most = max(self.most, len(self.held))
            return update

    class Held(LoraTensors):
        __hash__ = object.__hash__

    stored = Counted()
    product_gram(stored, block=3)
    assert stored.most <= 6
    assert stored.reads == 3 * (4 + 3 + 2 + 1)


def test_krum_on_raw_factors_is_decided_by_the_factors():
    fleet = make_fleet(1)
    assert multi_krum(raw_gram(fleet), ATTACKERS).kept == list(range(HONEST))
    # The same products; the honest nodes' factors differ as independent training makes them, the
    # attackers' do not.
    rotated = [rotate(u, i, spread=1.0) if i < HONEST else u for i, u in enumerate(fleet)]
    raw = multi_krum(raw_gram(rotated), ATTACKERS).kept
    assert raw != list(range(HONEST))
    assert set(range(HONEST, HONEST + ATTACKERS)) <= set(raw), (
        "the attackers are among those that raw Krum keeps"
    )
    assert multi_krum(product_gram(rotated), ATTACKERS).kept == list(range(HONEST))


def test_clipping_brings_norms_to_the_limit_and_raises_none():
    updates = [make_update(1, scale=scale) for scale in (1.0, 2.0, 10.0)]
    factors = clip_norms(product_gram(updates))
    np.testing.assert_allclose(factors, [1.0, 1.0, 0.2], rtol=1e-9)
    norm = float(np.sqrt(product_gram(updates)[0, 0]))
    np.testing.assert_allclose(
        clip_norms(product_gram(updates), norm / 2), [0.5, 0.25, 0.05], rtol=1e-9
    )
    zero = LoraTensors(
        {NAMES[0]: LoraModule(np.ones((1, IN), np.float32), np.zeros((OUT, 1), np.float32))}
    )
    assert clip_norms(product_gram([zero])).tolist() == [1.0]


def test_near_copies_and_small_fleets_are_all_kept():
    copies = [make_update(1, scale=2.0 + 0.001 * i) for i in range(6)]
    assert keep_near(product_gram(copies)).kept == list(range(6))
    assert keep_near(product_gram(make_fleet(0)[-3:])).kept == [0, 1, 2]
    assert keep_near(product_gram([*copies, make_update(2)])).kept == list(range(6))


def test_what_cannot_be_filtered_is_refused():
    gram = product_gram(make_fleet(0))
    with pytest.raises(MergeError, match="at least 11"):
        multi_krum(gram, 4)
    with pytest.raises(MergeError, match="keep 11 of 10"):
        multi_krum(gram, 1, keep=11)
    assert len(multi_krum(gram, 2, keep=3).kept) == 3
    with pytest.raises(MergeError, match="Limit"):
        clip_norms(gram, -1.0)
    other = LoraTensors(
        {NAMES[0]: LoraModule(np.ones((1, IN + 1), np.float32), np.ones((OUT, 1), np.float32))}
    )
    with pytest.raises(MergeError, match="expected"):
        product_gram([make_update(0), other])
