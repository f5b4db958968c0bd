"""Merging against PEFT: the scale that PEFT trains with, and `cat`, its exact combination."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from central.merging import merge
from protos.lora import LoraModule, LoraTensors, decode, encode
from tests.unit.central.merging.lora_factors import IN, OUT, dense, make_update


@pytest.fixture(scope="module")
def libraries():
    return pytest.importorskip("peft"), pytest.importorskip("torch")


def make_model(libraries, configs: list[dict], seeds: list[int]):
    """One linear layer `q` with an adapter `u0`, `u1`, ... per config, with the factors of
    make_update(seed).
    """
    peft, torch = libraries

    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(IN, OUT, bias=False)

    first, *others = (peft.LoraConfig(target_modules=["q"], **config) for config in configs)
    model = peft.PeftModel(Tiny(), first, adapter_name="u0")
    for index, config in enumerate(others, start=1):
        model.add_adapter(f"u{index}", config)
    layer = model.base_model.model.q
    for index, (config, seed) in enumerate(zip(configs, seeds, strict=True)):
        factors = make_update(seed, config["r"], ("q",)).modules["q"]
        layer.lora_A[f"u{index}"].weight.data = torch.from_numpy(factors.A)
        layer.lora_B[f"u{index}"].weight.data = torch.from_numpy(factors.B)
    return model, layer


def delta(layer, adapter: str) -> np.ndarray:
    return layer.get_delta_weight(adapter).detach().double().numpy()


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    # PEFT's `cat` multiplies by the root of a weight's size: not for zero.
    weights=st.lists(st.floats(-1.0, 2.0).filter(lambda w: abs(w) > 0.05), min_size=4, max_size=4),
)
def test_equals_peft_cat(libraries, ranks, weights):
    configs = [{"r": rank, "lora_alpha": 2 + 3 * index} for index, rank in enumerate(ranks)]
    seeds = list(range(len(ranks)))
    model, layer = make_model(libraries, configs, seeds)
    weights = weights[: len(ranks)]
    model.add_weighted_adapter(
        [f"u{i}" for i in seeds], weights, adapter_name="merged", combination_type="cat"
    )
    expected = delta(layer, "merged")
    updates = [
        (make_update(seed, config["r"], ("q",), scale=config["lora_alpha"] / config["r"]), weight)
        for seed, config, weight in zip(seeds, configs, weights, strict=True)
    ]
    merged = merge(LoraTensors(), updates, rank=sum(ranks), server_step=1.0, seed=0)
    size = sum(abs(weight) * np.linalg.norm(dense(tensors, "q")) for tensors, weight in updates)
    assert np.linalg.norm(dense(merged.tensors, "q") - expected) < 1e-6 * size


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_scale_is_folded_once(libraries, rank_stabilised):
    rank, alpha = 4, 12
    _, layer = make_model(
        libraries, [{"r": rank, "lora_alpha": alpha, "use_rslora": rank_stabilised}], [7]
    )
    scale = alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
    update = decode(encode(make_update(7, rank, ("q",), scale)))
    merged = merge(LoraTensors(), [(update, 1.0)], rank=8, server_step=1.0, seed=0)
    again = merge(decode(encode(merged.tensors)), [], rank=8, server_step=1.0, seed=0)
    for result in (merged, again):
        module = result.tensors.modules["q"]
        assert module.scale == 1.0
        assert np.linalg.norm(
            module.B.astype(np.float64) @ module.A - delta(layer, "u0")
        ) < 1e-6 * np.linalg.norm(delta(layer, "u0"))


def test_scales_differ_between_the_modules_of_one_update():
    one, two = (make_update(seed, 4, ("q",)).modules["q"] for seed in (1, 2))
    update = LoraTensors({"a": LoraModule(one.A, one.B, 0.5), "b": LoraModule(two.A, two.B, 8.0)})
    merged = merge(LoraTensors(), [(update, 1.0)], rank=4, server_step=1.0, seed=0)
    for name in ("a", "b"):
        np.testing.assert_allclose(dense(merged.tensors, name), dense(update, name), atol=1e-5)
