"""Laws of the chain of releases: long chains stay near the optimum, a removal undoes, the room
stands alone.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import merge
from protos.lora import LoraModule, LoraTensors
from tests.unit.central.merging.lora_factors import best_of_rank, dense, make_update, rotate

RANK = 8
OUT, IN = 160, 128


def make_increments(
    seed: int,
    *,
    directions: int,
    noise: float,
    power: float = 0.0,
    jitter: float = 1.0,
    decay: float = 0.0,
    environments: int = 1,
    in_order: bool = False,
    count: int = 200,
) -> list[LoraTensors]:
    """Increments of environments that learn `directions` orthogonal directions in all, each its
    own.

    An increment moves direction i (from 0) of its environment by (1 + i) ** -power * (1 + jitter *
    N(0, 1)) and adds two directions of noise, of norm `noise` * that of the learnt part on average;
    an environment's increment number t (from 0) is (1 + t) ** -decay as large. The environments
    take turns, or come one after another.
    """
    rng = np.random.default_rng(seed)
    B, A = (np.linalg.qr(rng.standard_normal((size, directions)))[0] for size in (OUT, IN))
    shares = np.array_split(np.arange(directions), environments)
    increments, seen = [], [0] * environments
    for index in range(count):
        environment = index * environments // count if in_order else index % environments
        own = shares[environment]
        size = (1.0 + np.arange(own.size)) ** -power
        learnt = B[:, own] * size * (1 + jitter * rng.standard_normal(own.size))
        left, right = rng.standard_normal((OUT, 2)), rng.standard_normal((2, IN))
        left *= noise * np.linalg.norm(size) * np.sqrt(1 + jitter**2) / np.linalg.norm(left @ right)
        factors = np.concatenate([A[:, own].T, right]), np.concatenate([learnt, left], axis=1)
        scale = (1.0 + seen[environment]) ** -decay
        increments.append(
            LoraTensors(
                {"m": LoraModule(*(factor.astype(np.float32) for factor in factors), scale)}
            )
        )
        seen[environment] += 1
    return increments


def chain(increments: list[LoraTensors], rank: int) -> LoraTensors:
    release = LoraTensors()
    for increment in increments:
        release = merge(release, [(increment, 1.0)], rank=rank, server_step=1.0, seed=0).tensors
    return release


def over_optimum(increments: list[LoraTensors]) -> float:
    """The chain's distance from the untruncated sum, as a multiple of that of the sum's best
    approximation of rank RANK.
    """
    total = sum(dense(increment, "m", (OUT, IN)) for increment in increments)
    _, optimum = best_of_rank(total, RANK)
    return float(np.linalg.norm(total - dense(chain(increments, RANK), "m", (OUT, IN))) / optimum)


JITTER = st.floats(0.3, 1.0)
SPECTRA = {
    "directions to spare, fading": {
        "directions": st.integers(2, RANK // 2),
        "noise": st.floats(0.02, 0.2),
        "jitter": JITTER,
        "decay": st.floats(0.0, 0.4),
        "environments": st.integers(1, 2),
    },
    "every direction, steady": {
        "directions": st.integers(4, RANK),
        "noise": st.floats(0.02, 0.5),
        "jitter": JITTER,
        "environments": st.integers(1, 4),
    },
    "one after another, little noise": {
        "directions": st.integers(4, RANK),
        "noise": st.floats(0.02, 0.1),
        "jitter": JITTER,
        "decay": st.floats(0.0, 0.25),
        "environments": st.integers(2, 4),
        "in_order": st.just(True),
    },
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_200_merges_in_a_row_stay_near_the_optimum(spectrum, data, seed):
    fields = data.draw(st.fixed_dictionaries(SPECTRA[spectrum]))
    assert over_optimum(make_increments(seed, **fields)) <= 1.05


@pytest.mark.parametrize(
    "fields",
    [
        {"directions": RANK, "noise": 0.3, "decay": 1.0},
        {"directions": 4 * RANK, "noise": 0.3, "power": 2.0, "decay": 0.5},
        {"directions": 4 * RANK, "noise": 0.3, "power": 1.0, "environments": 4, "in_order": True},
    ],
)
def test_where_a_chain_of_rank_r_loses_more(fields):
    """The README says so, and this would notice if it changed."""
    assert over_optimum(make_increments(0, **fields)) > 1.05


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), which=st.sampled_from(["columns", "rows"]))
def test_increments_that_share_r_columns_or_rows_lose_nothing(seed, which):
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((24, RANK)), rng.standard_normal((RANK, 20))
    release, total = LoraTensors(), np.zeros((24, 20))
    for index in range(200):
        if which == "columns":
            A = rng.standard_normal(A.shape) / (1 + index % 7)
        else:
            B = rng.standard_normal(B.shape) / (1 + index % 7)
        increment = LoraTensors(
            {"m": LoraModule(A.astype(np.float32), B.astype(np.float32), (-1.0) ** (index % 3))}
        )
        release = merge(release, [(increment, 1.0)], rank=RANK, server_step=1.0, seed=0).tensors
        total += dense(increment, "m", (24, 20))
    assert np.linalg.norm(dense(release, "m", (24, 20)) - total) < 1e-4 * np.linalg.norm(total)


def test_a_direction_that_comes_in_pieces_below_the_last_singular_value_never_enters():
    eye = np.eye(RANK + 1, dtype=np.float32)
    carried = LoraTensors({"m": LoraModule(eye[:RANK], eye[:, :RANK])})
    piece = LoraTensors({"m": LoraModule(eye[RANK:], 0.9 * eye[:, RANK:])})
    release = chain([carried] + 50 * [piece], RANK)
    assert np.allclose(dense(release, "m", (RANK + 1, RANK + 1)), np.diag([1.0] * RANK + [0.0]))


@pytest.mark.parametrize("seed", [0, 1])
def test_200_merges_in_a_row_are_the_dense_chain(seed):
    # Increments that share nothing: here the released rank itself forgets, and ours forgets what
    # the dense chain forgets.
    release, expected = LoraTensors(), np.zeros((24, 20))
    for index in range(200):
        increment = make_update(1000 * seed + index, rank=3, names=("m",))
        release = merge(release, [(increment, 1.0)], rank=RANK, server_step=1.0, seed=0).tensors
        expected, _ = best_of_rank(expected + dense(increment, "m"), RANK)
    assert np.linalg.norm(dense(release, "m") - expected) < 1e-4 * np.linalg.norm(expected)


@settings(max_examples=20, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    weights=st.lists(st.floats(0.05, 2.0), min_size=5, max_size=5),
    which=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
def test_a_signed_weight_removes_in_whatever_factors_it_comes(ranks, weights, which, seed):
    updates = [
        (make_update(seed + i, r), w) for i, (r, w) in enumerate(zip(ranks, weights, strict=False))
    ]
    gone, weight = updates[which % len(updates)]
    rest = [update for i, update in enumerate(updates) if i != which % len(updates)]
    parent = make_update(seed + 50, rank=3, scale=1.0)

    def run(terms):
        return merge(parent, terms, rank=20, server_step=1.5, seed=0).tensors

    removed, never = run([*updates, (rotate(gone, seed), -weight)]), run(rest)
    for name in parent.modules:
        size = np.linalg.norm(dense(never, name)) + 1.5 * weight * np.linalg.norm(dense(gone, name))
        assert np.linalg.norm(dense(removed, name) - dense(never, name)) < 2e-5 * size


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), rank=st.integers(1, 8), seed=st.integers(0, 1000))
def test_copies_of_one_update_are_that_update(count, rank, seed):
    update = make_update(seed, rank)
    copies = [(rotate(update, index), 1 / count) for index in range(count)]
    merged = merge(LoraTensors(), copies, rank=rank, server_step=1.0, seed=0)
    for name in update.modules:
        assert np.linalg.norm(
            dense(merged.tensors, name) - dense(update, name)
        ) < 2e-5 * np.linalg.norm(dense(update, name))
    assert merged.truncation_error < 1e-5


@settings(max_examples=20, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1),
        unique=True,
        max_size=4,
    )
)
def test_any_module_name_is_a_target(names):
    update = make_update(1, 3, tuple(names))
    merged = merge(LoraTensors(), [(update, 1.0)], rank=3, server_step=1.0, seed=0)
    assert list(merged.tensors.modules) == sorted(names)


def test_the_room_needs_no_flower_no_grpc_and_no_database():
    script = (
        "import sys, central.merging; "
        "others = {'flwr', 'grpc', 'sqlalchemy', 'torch', 'peft', 'hypothesis'}; "
        "print(sorted(others & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
