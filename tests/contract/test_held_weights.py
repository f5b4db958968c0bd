"""What a worker holds is compared with the file: vLLM's own layers, fused and in parallel parts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edge_node.serving.held import ADAPTER_FILE, HeldWeights, compare_held

ID, SLOTS, MOST, RANK, WIDTH = 7, 3, 8, 4, 6
SLOT = 1
Q, KV, HIDDEN = 8, 4, 10
LAYER = "model.layers.0"
SIZES = {
    "self_attn.q_proj": (Q, WIDTH), "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH), "self_attn.o_proj": (WIDTH, Q),
    "mlp.gate_proj": (HIDDEN, WIDTH), "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}  # fmt: skip
PACKED = {
    f"{LAYER}.self_attn.qkv_proj": [f"{LAYER}.self_attn.{one}_proj" for one in "qkv"],
    f"{LAYER}.mlp.gate_up_proj": [f"{LAYER}.mlp.{one}_proj" for one in ("gate", "up")],
}


def factors(modules: list[str] | None = None) -> dict[str, tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{LAYER}.{name}": (
            torch.randn(RANK, columns, generator=generator),
            torch.randn(rows, RANK, generator=generator),
        )
        for name, (rows, columns) in SIZES.items()
        if modules is None or name in modules
    }


def layer(kind: Any, rank: int, ways: int, rows: list[int], columns: int) -> Any:
    """vLLM's layer without its base: stacks of zeros, and what its `set_lora` reads."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    made.tp_rank, made.tp_size, made.n_slices = rank, ways, len(rows)
    made.input_size, made.is_merged_col_linear = columns, False
    made.output_size, made.output_sizes = rows[0], [size * ways for size in rows]
    made.output_slices, made.output_ids = tuple(rows), (rank,) * len(rows)
    made.lora_a_stacked = tuple(
        torch.zeros(SLOTS, 1, MOST, columns, dtype=torch.bfloat16) for _ in rows
    )
    made.lora_b_stacked = tuple(
        torch.zeros(SLOTS, 1, size, MOST, dtype=torch.bfloat16) for size in rows
    )
    return made


def worker(held: dict[str, tuple[Any, Any]], rank: int = 0, ways: int = 1) -> Any:
    """A worker of `ways`, in which vLLM's own functions packed and set what is `held`."""
    from vllm.lora.layers.column_parallel_linear import (
        MergedColumnParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
    )
    from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights
    from vllm.lora.model_manager import LoRAModelManager

    halves = [HIDDEN // ways] * 2
    modules = {
        f"{LAYER}.self_attn.qkv_proj": layer(
            MergedQKVParallelLinearWithLoRA, rank, ways, [Q // ways, KV // ways, KV // ways], WIDTH
        ),
        f"{LAYER}.self_attn.o_proj": layer(
            RowParallelLinearWithLoRA, rank, ways, [WIDTH], Q // ways
        ),
        f"{LAYER}.mlp.gate_up_proj": layer(
            MergedColumnParallelLinearWithLoRA, rank, ways, halves, WIDTH
        ),
        f"{LAYER}.mlp.down_proj": layer(
            RowParallelLinearWithLoRA, rank, ways, [WIDTH], HIDDEN // ways
        ),
    }
    loras = {
        name: LoRALayerWeights(name, RANK, RANK, a.bfloat16(), b.bfloat16())
        for name, (a, b) in held.items()
    }
    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.modules, manager.packed_modules = modules, PACKED
    manager.lora_index_to_id = [None, ID, None]
    manager.lora_config = SimpleNamespace(lora_dtype=torch.bfloat16)
    manager.model = SimpleNamespace()
    manager.is_pooling_model = False
    adapter = LoRAModel(ID, RANK, loras)
    if loras:
        manager._is_non_gated_moe = manager._enable_moe_shared_loras = False
        manager._create_merged_loras_inplace(adapter)
    manager._registered_adapters = {ID: adapter}
    for name, module in modules.items():
        if (kept := adapter.get_lora(name)) is not None:
            module.set_lora(SLOT, kept.lora_a, kept.lora_b)
    made = HeldWeights()
    made.model_runner = SimpleNamespace(  # type: ignore[attr-defined]
        lora_manager=SimpleNamespace(_adapter_manager=manager)
    )
    made.manager = manager  # type: ignore[attr-defined]
    return made


def write(folder: Path, content: dict[str, tuple[Any, Any]]) -> Path:
    arrays = {}
    for name, (a, b) in content.items():
        arrays[f"base_model.model.{name}.lora_A.weight"] = a
        arrays[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(arrays, folder / ADAPTER_FILE)
    return folder


async def compare(folder: Path, *workers: Any) -> dict[str, str]:
    async def call(method: str, arguments: tuple[Any, ...]) -> list[Any]:
        return [getattr(one, method)(*arguments) for one in workers]

    held = await compare_held(call, ID, folder)
    return held.wrong


@pytest.mark.parametrize("ways", [1, 2])
async def test_each_rank_holds_its_part_of_fused_layers(tmp_path: Path, ways: int) -> None:
    folder = write(tmp_path, factors())
    workers = [worker(factors(), rank, ways) for rank in range(ways)]
    assert await compare(folder, *workers) == {}
    last = workers[-1].manager.modules[f"{LAYER}.self_attn.qkv_proj"]
    last.lora_b_stacked[2][SLOT, 0, 0, 0] += 1
    wrong = await compare(folder, *workers)
    assert set(wrong) == {f"{LAYER}.self_attn.{one}_proj" for one in "qkv"}
    assert "slot" in wrong[f"{LAYER}.self_attn.v_proj"]


async def test_ranks_that_are_exchanged_are_found(tmp_path: Path) -> None:
    workers = [worker(factors(), rank, 2) for rank in range(2)]
    for one in workers:
        for module in one.manager.modules.values():
            module.tp_rank = 1 - module.tp_rank
            module.output_ids = (module.tp_rank,) * module.n_slices
            module.q_shard_id = module.kv_shard_id = module.tp_rank
    assert await compare(write(tmp_path, factors()), *workers)


async def test_modules_that_a_release_has_not_are_zero(tmp_path: Path) -> None:
    some = factors(["self_attn.v_proj", "mlp.down_proj"])
    folder = write(tmp_path, some)
    one = worker(some)
    assert await compare(folder, one) == {}
    one.manager.modules[f"{LAYER}.mlp.gate_up_proj"].lora_a_stacked[0][SLOT, 0, 0, 0] = 1
    assert set(await compare(folder, one)) == {f"{LAYER}.mlp.gate_up_proj"}
    one = worker(some)
    one.manager.modules[f"{LAYER}.mlp.down_proj"].lora_a_stacked[0][SLOT, 0, RANK, 0] = 1
    assert set(await compare(folder, one)) == {f"{LAYER}.mlp.down_proj"}, "beyond its rank"


async def test_layers_that_no_adapter_has_are_passed_over(tmp_path: Path) -> None:
    """vLLM wraps embeddings and head too; those have no slices."""
    one = worker(factors())
    one.manager.modules["model.embed_tokens"] = torch.nn.Module()
    assert await compare(write(tmp_path, factors()), one) == {}


async def test_what_is_not_delivered_or_has_no_place_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, factors())
    empty = worker(factors())
    empty.manager._registered_adapters = {}
    assert set(await compare(folder, empty)) == set(factors())
    assert len(await compare(folder, worker({}))) == len(factors())
    odd = factors() | {"model.layers.9.mlp.up_proj": factors()[f"{LAYER}.mlp.up_proj"]}
    wrong = await compare(write(tmp_path, odd), worker(factors()))
    assert wrong == {"model.layers.9.mlp.up_proj": "vLLM has no such module, and left it out"}


async def test_an_adapter_without_a_slot_is_compared_in_memory(tmp_path: Path) -> None:
    folder, one = write(tmp_path, factors()), worker(factors())
    one.manager.lora_index_to_id = [None] * SLOTS
    assert await compare(folder, one) == {}
    one.manager._registered_adapters[ID].loras[f"{LAYER}.mlp.down_proj"].lora_b *= 0.97
    wrong = await compare(folder, one)
    assert list(wrong) == [f"{LAYER}.mlp.down_proj"]
    assert "copy in memory" in wrong[f"{LAYER}.mlp.down_proj"]


async def test_a_large_adapter_is_compared_in_several_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.serving.held.CALL_BYTES", 1)
    folder, one, calls = write(tmp_path, factors()), worker(factors()), []
    real = one.lorikeet_held
    one.lorikeet_held = lambda *arguments: calls.append(arguments) or real(*arguments)
    assert await compare(folder, one) == {}
    assert [first for _, _, first, _ in calls] == [0, 1, 2, 3]
