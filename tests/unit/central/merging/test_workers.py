"""Modules side by side: no byte depends on the number of workers, and an error stops them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import ProductSum
from central.merging.errors import MergeError
from central.merging.module_sum import ModuleSum
from central.merging.workers import MAX_WORKERS, default_workers, each
from protos.lora import LoraModule, LoraTensors, encode
from tests.unit.central.merging.lora_factors import make_update

NAMES = tuple(f"layers.{index}.q" for index in range(6))


def combine(seeds: list[int], rank: int, exact_rank: int, workers: int) -> tuple[bytes, float]:
    total = ProductSum(rank=rank, seed=7, exact_rank=exact_rank, workers=workers)
    for seed in seeds:
        total.add(make_update(seed, 5, NAMES[seed % 2 :]), 1 / len(seeds))
    merged = total.result()
    return encode(merged.tensors), merged.truncation_error


def delayed(delays: list[float], method: str):
    """ModuleSum's method, which ends later by a time of the module's own."""
    original = getattr(ModuleSum, method)

    def late(self: ModuleSum, *arguments: object):
        time.sleep(delays[NAMES.index(self._name)])
        return original(self, *arguments)

    return late


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(0, 1000), min_size=1, max_size=8),
    rank=st.integers(1, 6),
    exact_rank=st.sampled_from([1, 512]),  # 1: folds above a summed rank of 8 * rank
    workers=st.integers(2, 9),
    delays=st.lists(st.sampled_from([0, 0.001, 0.003]), min_size=6, max_size=6),
)
def test_no_byte_depends_on_the_number_of_workers_or_on_who_ends_first(
    seeds, rank, exact_rank, workers, delays
):
    alone = combine(seeds, rank, exact_rank, 1)
    with pytest.MonkeyPatch.context() as patch:
        for method in ("add", "result"):
            patch.setattr(ModuleSum, method, delayed(delays, method))
        assert combine(seeds, rank, exact_rank, workers) == alone


def test_large_modules_have_the_same_bytes_too():
    """Large enough for BLAS to split a product, if it had threads to split it among."""
    rng = np.random.default_rng(0)
    modules = {
        name: LoraModule(
            rng.standard_normal((96, 700), np.float32), rng.standard_normal((900, 96), np.float32)
        )
        for name in NAMES
    }
    made = set()
    for workers in (1, 2, 4):
        total = ProductSum(rank=16, seed=0, workers=workers)
        total.add(LoraTensors(modules), 1.0)
        made.add(encode(total.result().tensors))
    assert len(made) == 1


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_error_names_its_module_and_stops_the_others(workers):
    names = [f"m{index:03}" for index in range(200)]
    begun = []

    def work(name: str) -> str:
        begun.append(name)
        time.sleep(0.002)
        if name in ("m003", "m005"):
            raise np.linalg.LinAlgError("SVD did not converge")
        return name

    with pytest.raises(np.linalg.LinAlgError, match="Module 'm003': SVD did not converge"):
        list(each(names, work, workers))
    assert len(begun) < 50


def test_no_module_begins_after_an_error_while_an_earlier_one_is_in_work():
    begun = []

    def work(name: str) -> str:
        begun.append(name)
        if name == "b":
            raise FloatingPointError("overflow")
        time.sleep(0.3 if name == "a" else 0.01)
        return name

    with pytest.raises(FloatingPointError, match="Module 'b': overflow"):
        list(each("abcdefghij", work, 2))
    assert sorted(begun) == ["a", "b"]


def test_a_module_that_does_not_fit_is_named_whatever_the_number_of_workers():
    total = ProductSum(rank=4, seed=0, workers=3)
    total.add(make_update(1, 4, NAMES), 1.0)
    wrong = dict(make_update(2, 4, NAMES).modules)
    for name in NAMES[2:4]:
        wrong[name] = LoraModule(np.ones((4, 3), np.float32), np.ones((3, 4), np.float32))
    with pytest.raises(MergeError) as raised:
        total.add(LoraTensors(wrong), 1.0)
    assert raised.value.module == NAMES[2]


def test_what_is_made_comes_in_the_order_of_the_names():
    def work(name: str) -> str:
        time.sleep(0.005 if name < "c" else 0)
        return name

    assert list(each("abcdef", work, 3)) == list("abcdef")
    assert list(each([], work, 3)) == []


def test_a_worker_computes_under_the_callers_error_state():
    def work(name: str) -> str:
        return np.geterr()["over"]

    with np.errstate(over="raise"):
        assert list(each(["a", "b"], work, 2)) == ["raise", "raise"]


def test_the_machine_says_how_many_workers_there_are(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 5})
    assert default_workers() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert default_workers() == MAX_WORKERS
