"""LoRA on CPU that leaves requests for the base alone and takes one matrix product per adapter.

In: the adapter slot of every row of a batch, as vLLM gives it; -1 is the base. Out: a PunicaWrapper
that vLLM's CPU platform uses instead of its own. Guarantees: a row of slot -1 is never changed by
any adapter; every other row gets the product of its own adapter only.

vLLM 0.32 indexes the stacked adapters with the slot, and -1 is the last one in torch: a request for
the base that shares a batch was answered with the last adapter's weights. It also copies a whole
adapter for every token, which made a prompt 20 times slower than without an adapter.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from edge_node.serving.internals import check_cpu_lora

Rows: TypeAlias = slice | torch.Tensor
"""Rows of a batch: a slice where they are neighbours, else their int64 indices."""


def install(platform: Any) -> None:
    """Makes the CPU platform use AdapterProducts; raises ServingError for another vLLM."""
    check_cpu_lora()
    name = f"{AdapterProducts.__module__}.{AdapterProducts.__qualname__}"
    platform.get_punica_wrapper = classmethod(lambda cls: name)


class AdapterProducts(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's CPU wrapper with another arithmetic; called once for each module and step.

    Stacked weights have the model's dtype: A `[slots, 1, rank, in]`, B `[slots, 1, out, rank]`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_rows: list[tuple[int, Rows]] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Runs once per step, so that the modules need not look for their rows."""
        super().update_metadata(*args, **kwargs)
        self._token_rows = rows_of_slots(self.token_lora_indices)

    def _apply_shrink(
        self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
    ) -> None:
        shrink(y.view(-1, y.shape[-1]), x, w_t_all, scale, self._token_rows)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        expand(y[:, y_offset : y_offset + y_slice_size], x, w_t_all, add_inputs, self._token_rows)

    def add_lora_embedding(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y += x @ B^T` for the rows of adapters; x `[tokens, rank]`, y `[tokens, out]`."""
        expand(y, x, lora_b_stacked, add_inputs, self._token_rows)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[torch.Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """`y += scale * x @ A^T @ B^T` by slices; x `[tokens, in]`, y `[tokens, all slices]`.

        It leaves out vLLM's float32 buffer: that took a third of the time of a small step.
        """
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for slot, rows in self._token_rows:
            inputs, offset = x[rows], 0
            for A, B, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                inner = _inner(inputs, _weight(A, slot), scale)
                _add(y[:, offset : offset + width], rows, inner, _weight(B, slot))
                offset += width

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Leaves the logits as they are: no adapter of this node has a part for lm_head.

        The base's linear modules are without it, and a release with another module is refused. When
        a prompt's log-probabilities are asked for, vLLM brings the prompt's rows and does not say
        whose they are.
        """


def rows_of_slots(slots: torch.Tensor) -> list[tuple[int, Rows]]:
    """Which rows belong to which slot. slots: int64 `[rows]`; a row of -1 belongs to none."""
    found: list[tuple[int, Rows]] = []
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            rows = (slots == slot).nonzero().squeeze(1)
            first, last = int(rows[0]), int(rows[-1])
            neighbours = last - first + 1 == rows.shape[0]
            found.append((slot, slice(first, last + 1) if neighbours else rows))
    return found


def shrink(
    y: torch.Tensor,
    x: torch.Tensor,
    stacked: torch.Tensor,
    scale: float,
    rows_of: list[tuple[int, Rows]],
) -> None:
    """`y = scale * x @ W^T` for each slot's rows; y float32 `[rows, rank]`; others stay."""
    for slot, rows in rows_of:
        inner = _inner(x[rows], _weight(stacked, slot), scale)
        y[rows, : inner.shape[1]] = inner.to(y.dtype)


def expand(
    y: torch.Tensor,
    x: torch.Tensor,
    stacked: torch.Tensor,
    add_inputs: bool,
    rows_of: list[tuple[int, Rows]],
) -> None:
    """`y += x @ W^T` for each slot's rows (`y =` without `add_inputs`); other rows stay."""
    for slot, rows in rows_of:
        if not add_inputs:
            y[rows] = 0
        _add(y, rows, x[rows], _weight(stacked, slot))


def _weight(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    """The matrix of one slot; vLLM stacks `[slots, 1, out, in]`, for some modules without the 1."""
    return stacked[slot, 0] if stacked.dim() == 4 else stacked[slot]


def _inner(x: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
    product = torch.mm(x.to(weight.dtype), weight.t())
    return product if scale == 1 else product * scale


def _add(y: torch.Tensor, rows: Rows, x: torch.Tensor, weight: torch.Tensor) -> None:
    """`y[rows] += x @ weight^T`, in y's dtype; x has these rows only."""
    x, weight = x.to(y.dtype), weight.to(y.dtype).t()
    if isinstance(rows, slice):
        y[rows].addmm_(x, weight)  # half the time of a product and an addition
    else:
        y.index_add_(0, rows, torch.mm(x, weight))
