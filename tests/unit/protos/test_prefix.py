"""Prefixes of a release are its best approximations of lower rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import merge
from protos.lora import LoraCodecError, LoraModule, LoraTensors, encode
from protos.prefix import prefix
from tests.unit.central.merging.lora_factors import NAMES, best_of_rank, dense, make_update


def make_release(seed: int, rank: int = 12) -> LoraTensors:
    updates = [(make_update(seed + i, 1 + i), 0.3) for i in range(5)]
    return merge(
        make_update(seed + 9, 2, NAMES[:2], 1.0), updates, rank=rank, server_step=1.0, seed=0
    ).tensors


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 14))
def test_a_prefix_is_the_best_of_its_rank_and_says_what_it_leaves_out(seed, rank):
    release = make_release(seed)
    short = prefix(release, rank)
    total = cut = 0.0
    for name in NAMES:
        full = dense(release, name)
        _, optimum = best_of_rank(full, rank)
        error = np.linalg.norm(full - dense(short.tensors, name))
        assert error <= optimum * (1 + 1e-6) + 1e-6 * np.linalg.norm(full)
        total, cut = total + np.sum(full**2), cut + optimum**2
    assert short.error == pytest.approx(np.sqrt(cut / total), abs=2e-6)
    assert short.tensors.rank == min(rank, release.rank)


def test_prefixes_are_nested_to_the_byte():
    release = make_release(3)
    assert encode(prefix(prefix(release, 8).tensors, 4).tensors) == encode(
        prefix(release, 4).tensors
    )
    assert encode(prefix(release, 12).tensors) == encode(release)
    assert prefix(release, 12).error == 0.0
    assert prefix(LoraTensors(), 4).error == 0.0


def test_factors_that_are_no_release_are_refused():
    with pytest.raises(LoraCodecError, match=r"layers\.0\.q.*not orthogonal"):
        prefix(make_update(1), 2)
    module = make_release(1).modules[NAMES[0]]
    backwards = LoraModule(module.A[::-1].copy(), module.B[:, ::-1].copy())
    with pytest.raises(LoraCodecError, match="out of order"):
        prefix(LoraTensors({NAMES[0]: backwards}), 2)
    with pytest.raises(LoraCodecError, match="at least 1"):
        prefix(make_release(1), 0)
