"""LoRA on CPU against a dense reference: base and adapters in one batch; no engine starts."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_node.errors import ServingError
from edge_node.serving import internals
from edge_node.serving.cpu_lora import AdapterProducts, install

pytestmark = pytest.mark.timeout(240)

SLOTS = 4
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""Of the largest value in the output; bfloat16 keeps eight bits."""
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass
class Batch:
    """Rows of one step: `slots[i]` is row i's adapter, -1 the base; A and B of every slot."""

    slots: list[int]
    x: torch.Tensor
    A: tuple[torch.Tensor, ...]
    B: tuple[torch.Tensor, ...]
    y: torch.Tensor

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(weight.shape[-2] for weight in self.B)

    def wrapper(self) -> AdapterProducts:
        """As vLLM sets it up: adapter ids from 1, and any slot may hold any of them."""
        from vllm.lora.layers import LoRAMapping

        ids = [3, 1, 4, 2]  # of slots 0 to 3
        rows = tuple(ids[slot] if slot >= 0 else 0 for slot in self.slots)
        wrapper = AdapterProducts(
            max(len(rows), 1), max_batches=max(len(rows), 1), device=torch.device("cpu")
        )
        wrapper.update_metadata(LoRAMapping(rows, rows, is_prefill=True), ids, SLOTS + 1, 1000)
        return wrapper

    def expected(self, scale: float) -> torch.Tensor:
        """`y + scale * x @ A^T @ B^T` row by row in float64; rows of the base as they were."""
        expected, offset = self.y.double().clone(), 0
        for A, B in zip(self.A, self.B, strict=True):
            for row, slot in enumerate(self.slots):
                if slot >= 0:
                    inner = scale * (A[slot, 0].double() @ self.x[row].double())
                    expected[row, offset : offset + B.shape[-2]] += B[slot, 0].double() @ inner
            offset += B.shape[-2]
        return expected

    def check(self, y: torch.Tensor, expected: torch.Tensor) -> None:
        base = [row for row, slot in enumerate(self.slots) if slot < 0]
        assert torch.equal(y[base], self.y[base]), "rows of the base must not change by a bit"
        largest = max(float(expected.abs().max()), 1.0)
        assert float((y.double() - expected).abs().max()) <= TOLERANCE[y.dtype] * largest


@st.composite
def batches(draw: st.DrawFn, slices: int | None = None) -> Batch:
    runs = draw(
        st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.integers(1, 9)), min_size=1, max_size=8)
    )
    slots = [slot for slot, length in runs for _ in range(length)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    inputs, rank = draw(st.integers(1, 24)), draw(st.integers(1, 9))
    widths = draw(st.lists(st.integers(1, 20), min_size=slices or 1, max_size=slices or 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return Batch(
        slots,
        x=torch.randn(len(slots), inputs, dtype=dtype),
        A=tuple(torch.randn(SLOTS, 1, rank, inputs, dtype=dtype) for _ in widths),
        B=tuple(torch.randn(SLOTS, 1, width, rank, dtype=dtype) for width in widths),
        y=torch.randn(len(slots), sum(widths), dtype=dtype),
    )


@SETTINGS
@given(batches(), st.sampled_from([1.0, 0.5, 2.0]))
def test_every_row_gets_its_own_adapter_and_the_base_gets_none(batch: Batch, scale: float) -> None:
    y = batch.y.clone()
    batch.wrapper().add_lora_linear(y, batch.x, batch.A, batch.B, scale, batch.widths)
    batch.check(y, batch.expected(scale))


@SETTINGS
@given(batches(), st.booleans())
def test_shrink_and_expand_alone_as_sharded_layers_call_them(
    batch: Batch, add_inputs: bool
) -> None:
    wrapper, y, rank = batch.wrapper(), batch.y.clone(), batch.B[0].shape[-1]
    buffers = torch.zeros(len(batch.A), len(batch.slots), rank, dtype=torch.float32)
    wrapper.add_shrink(buffers, batch.x, batch.A, 1.0)
    wrapper.add_expand(y, buffers, batch.B, batch.widths, add_inputs=add_inputs)
    expected = batch.expected(1.0)
    if not add_inputs:
        adapted = [row for row, slot in enumerate(batch.slots) if slot >= 0]
        expected[adapted] -= batch.y[adapted].double()
    batch.check(y, expected)


@SETTINGS
@given(batches(slices=1), st.integers(1, 60))
def test_logits_stay_as_they_are_for_as_many_rows_as_vllm_brings(batch: Batch, rows: int) -> None:
    """A prompt whose log-probabilities are asked for has more rows than the batch has samples."""
    y, x = torch.randn(rows, batch.y.shape[1]), torch.randn(rows, batch.x.shape[1])
    before = y.clone()
    batch.wrapper().add_lora_logits(y, x, batch.A[0], batch.B[0], 1.0)
    assert torch.equal(y, before)


@SETTINGS
@given(batches(slices=1))
def test_embeddings(batch: Batch) -> None:
    """vLLM has looked A up already, for the base's rows in slot 0; only B is left to do."""
    y = batch.y.clone()
    inner = torch.stack([batch.A[0][max(slot, 0), 0, :, 0] for slot in batch.slots])
    batch.wrapper().add_lora_embedding(y, inner, batch.B[0], add_input=True)
    expected = batch.y.double().clone()
    for row, slot in enumerate(batch.slots):
        if slot >= 0:
            expected[row] += batch.B[0][slot, 0].double() @ inner[row].double()
    batch.check(y, expected)


def test_a_wrapper_that_was_told_nothing_yet_changes_nothing() -> None:
    wrapper = AdapterProducts(8, max_batches=8, device=torch.device("cpu"))
    y = torch.ones(8, 3)
    wrapper.add_lora_linear(
        y, torch.ones(8, 2), (torch.ones(SLOTS, 1, 1, 2),), (torch.ones(SLOTS, 1, 3, 1),), 1.0, (3,)
    )
    assert torch.equal(y, torch.ones(8, 3))


def test_the_cpu_platform_of_the_installed_vllm_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper
    from vllm.platforms.cpu import CpuPlatform

    class Platform(CpuPlatform):
        pass

    install(Platform)
    monkeypatch.setattr("vllm.lora.punica_wrapper.punica_selector.current_platform", Platform())
    assert type(get_punica_wrapper(8, max_batches=8, device=torch.device("cpu"))) is AdapterProducts


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("add_lora_logits", "add_lora_logits has no parameter buffer"),
        ("_apply_expand", "_apply_expand has no parameter add_inputs"),
    ],
)
def test_another_vllm_is_refused_and_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, method: str, message: str
) -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
    from vllm.platforms.cpu import CpuPlatform

    class Platform(CpuPlatform):
        pass

    def other(self: Any, y: Any, x: Any, indices: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(PunicaWrapperCPU, method, other)
    with pytest.raises(ServingError, match=message):
        install(Platform)
    assert Platform.get_punica_wrapper() == CpuPlatform.get_punica_wrapper()


def test_one_parameter_more_is_a_difference() -> None:
    surface = {"vllm.lora.request": {"LoRARequest": ("lora_name", "lora_int_id")}}
    with pytest.raises(ServingError, match="LoRARequest takes lora_name, lora_int_id, lora_path"):
        internals._check_surface(surface, exact=True)
    internals._check_surface(surface)


def test_a_process_of_another_vllm_ends_when_it_loads_the_plug_ins() -> None:
    """What every vLLM process does at its start: the server, the engine core, the worker."""
    start = (
        "from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU\n"
        "PunicaWrapperCPU.add_lora_logits = lambda self, y, x: None\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
    )
    environment = os.environ | {"VLLM_PLUGINS": "lorikeet"}
    done = subprocess.run(
        [sys.executable, "-c", start], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ServingError: vLLM 0.32" in done.stderr
    assert "add_lora_logits has no parameter buffer" in done.stderr
    assert "Install an unmodified vllm==0.32.0" in done.stderr
