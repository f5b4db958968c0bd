"""Bounds of an increment's parts: the bound itself still passes, and what is beyond it is named."""

from __future__ import annotations

import numpy as np
import pytest

from central.merging import bounds
from central.merging.bounds import EMPTY, excess, excess_of, frobenius
from protos.lora import LoraModule, LoraTensors
from tests.unit.central.merging.lora_factors import make_update


@pytest.mark.parametrize(
    ("scale", "norm_a", "norm_b"), [(1e4, 1.0, 1.0), (-1e4, 1.0, 1.0), (1.0, 1e4, 1e4)]
)
def test_a_part_at_its_bound_passes(scale: float, norm_a: float, norm_b: float) -> None:
    assert excess("m", scale, norm_a, norm_b) == ""


@pytest.mark.parametrize(
    ("scale", "norm_a", "norm_b", "text"),
    [
        (10001.0, 1.0, 1.0, "has scale 10001; expected at most 10000"),
        (-10001.0, 1.0, 1.0, "has scale -10001; expected at most 10000"),
        (float("nan"), 1.0, 1.0, "has scale nan; expected at most 10000"),
        (1.0, 10001.0, 1.0, "has factor A of Frobenius norm 10001; expected at most 10000"),
        (1.0, 1.0, 10001.0, "has factor B of Frobenius norm 10001; expected at most 10000"),
        (1.0, 1.0, float("nan"), "has factor B of Frobenius norm nan; expected at most 10000"),
    ],
)
def test_a_part_beyond_its_bound_is_named(
    scale: float, norm_a: float, norm_b: float, text: str
) -> None:
    assert f"Module 'm' {text}" in excess("m", scale, norm_a, norm_b)


def module(value: float, scale: float = 1.0) -> LoraModule:
    """Factors of norm 1 and `value`."""
    return LoraModule(
        np.array([[1.0, 0.0]], np.float32), np.array([[0.0], [value]], np.float32), scale
    )


def test_an_update_is_out_of_bounds_where_its_first_bad_module_is() -> None:
    assert excess_of(make_update(0)) == ""
    modules = {"c": module(1.0, 3e4), "b": module(2e4), "a": module(1.0)}
    assert excess_of(LoraTensors(modules)).startswith("Module 'b' has factor B")


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ({}, EMPTY),
        ({"a": module(0.0)}, EMPTY),
        ({"a": module(1e-12)}, EMPTY),
        ({"a": module(1.1e-12)}, ""),
        ({"a": module(4e-13, -3.0)}, ""),
        ({"a": module(1.0), "b": module(0.0)}, ""),
        ({"a": module(0.0), "b": module(1.0)}, ""),
    ],
)
def test_an_update_of_which_no_module_changes_a_weight_is_empty(
    modules: dict[str, LoraModule], text: str
) -> None:
    assert excess_of(LoraTensors(modules)) == text


@pytest.mark.parametrize("values", [1, 3, 1 << 20])
def test_the_norm_is_that_of_all_values(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "_SLICE", values)
    factor = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    expected = np.sqrt(np.sum(factor.astype(np.float64) ** 2))
    assert frobenius(factor) == pytest.approx(expected, rel=1e-12)
    assert frobenius(np.full((2, 2), 1e-30, np.float32)) == pytest.approx(2e-30)
    assert frobenius(np.full((2, 2), 3e38, np.float32)) == pytest.approx(6e38)
    assert np.isinf(frobenius(np.array([[np.inf, 1.0]], np.float32)))
