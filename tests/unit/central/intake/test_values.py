"""Values of a payload: the bound that is made on the way never lets through what the exact norm would refuse."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.errors import Reason, Refused
from central.intake import values
from central.intake.values import Entry, Factor, SquareSums, check_norms, increment_norm, lay_out
from protos.lora import LoraModule

START = 24
"""Bytes before the first tensor."""


@contextmanager
def written(modules: dict[str, LoraModule], gap: int = 0) -> Iterator[tuple[Path, dict[Factor, Entry]]]:
    """A file with the modules' factors, `gap` bytes between two of them, and where they lie."""
    entries: dict[Factor, Entry] = {}
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"h" * START)
        for name, module in modules.items():
            for factor, array in (("A", module.A), ("B", module.B)):
                entries[name, factor] = Entry("F32", (array.shape[0], array.shape[1]), file.tell() - START)
                file.write(array.tobytes() + b"\xff" * gap)
        file.flush()
        yield Path(file.name), entries


def sums_of(path: Path, entries: dict[Factor, Entry], window: int) -> SquareSums:
    sums, data = SquareSums(lay_out(entries)), path.read_bytes()[START:]
    for begin in range(0, len(data), window):
        sums.add(memoryview(data[begin : begin + window]), begin)
    return sums


def make(seed: int, rank: int, scale: float = 0.5) -> LoraModule:
    random = np.random.default_rng(seed)
    return LoraModule(
        random.standard_normal((rank, 7)).astype(np.float32),
        random.standard_normal((9, rank)).astype(np.float32),
        scale,
    )


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    gap=st.integers(0, 3),
    window=st.integers(1, 80),
    values=st.integers(1, 50),
)
def test_the_sums_are_upper_bounds_whatever_the_windows(ranks: list[int], gap: int, window: int, values: int) -> None:
    modules = {f"m{number}": make(number, rank) for number, rank in enumerate(ranks)}
    with pytest.MonkeyPatch.context() as patch, written(modules, 4 * gap) as (path, entries):
        patch.setattr("central.intake.values.SUM_VALUES", values)
        found = sums_of(path, entries, 4 * window).upper_bounds
    for name, module in modules.items():
        for factor, array in (("A", module.A), ("B", module.B)):
            true = float(np.sum(array.astype(np.float64) ** 2))
            assert true <= found[name, factor] <= true * 1.006


def test_a_factor_that_begins_within_a_float_is_refused() -> None:
    with written({"m": make(0, 4)}, gap=1) as (_, entries), pytest.raises(Refused, match="expected a multiple of 4"):
        lay_out(entries)


def check(module: LoraModule, max_norm: float) -> None:
    with written({"m": module}) as (path, entries):
        check_norms(sums_of(path, entries, 128), path, START, entries, {"m": module.scale}, max_norm)


def test_the_exact_norm_decides_where_the_bound_does_not_tell() -> None:
    module = make(0, 4)
    norm = increment_norm(module)
    # Far below the product of the factors' norms, so only the exact norm can admit it.
    check(module, norm * 1.0001)
    with pytest.raises(Refused) as caught:
        check(module, norm * 0.9999)
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS


def test_the_exact_norm_is_not_computed_where_the_bound_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "increment_norm", lambda _: pytest.fail("was computed"))
    check(make(0, 4), 1e3)


@pytest.mark.parametrize("position", [0, 31, 32, 62])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_value_is_found_in_every_window(position: int, value: float) -> None:
    module = make(0, 9)
    module.A.flat[position] = value
    with pytest.raises(Refused) as caught:
        check(module, 1e3)
    assert caught.value.reason is Reason.NOT_FINITE


def test_values_whose_squares_vanish_in_float32_do_not_slip_through() -> None:
    module = LoraModule(np.full((1, 7), 1e-23, np.float32), np.full((9, 1), 1e18, np.float32), 1.0)
    with pytest.raises(Refused) as caught:
        check(module, increment_norm(module) / 2)
    assert caught.value.reason is Reason.NORM_OUT_OF_BOUNDS
