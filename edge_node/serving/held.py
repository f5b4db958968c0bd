"""What vLLM's workers hold of an adapter, compared with its file inside each worker.

In: an adapter's id, its PEFT directory. Out: the modules that are held as the file says, and those
that are not. Guarantees: a value counts as held only when it is the file's, rounded to the type
that vLLM keeps adapters in, in every place where it is kept: the copy in memory, and the slot that
a batch reads where the adapter has one. Fused layers (qkv_proj, gate_up_proj) are compared part by
part, and with tensor parallelism each rank compares the rows or columns that are its own. It reads
the file by itself, not with vLLM's loader.

The class is mixed into vLLM's worker by `--worker-extension-cls`, and is called through the
engine's collective RPC between two steps of the engine. So one call compares a part of the adapter.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CALL_BYTES = 8 << 20
"""Of an adapter that one call compares: other requests wait meanwhile. Measured with the shapes of
an 8B model, rank 16, in bfloat16: 8 MiB take 25 ms of one core, the whole adapter 0.25 s."""
HELD_SURFACE: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm.v1.engine.async_llm": {"AsyncLLM.collective_rpc": ("method", "args")},
    "vllm.lora.model_manager": {
        "LoRAModelManager.get_adapter": ("adapter_id",),
        "LoRAModelManager._get_lora_layer_weights": ("lora_model", "module_name"),
    },
    "vllm.lora.utils": {"parse_fine_tuned_lora_name": ("name", "weights_mapper")},
    "vllm.lora.layers.base_linear": {
        "BaseLinearLayerWithLoRA.set_lora": ("index", "lora_a", "lora_b"),
    },
    "vllm.entrypoints.generate.base.serving": {"GenerateBaseServing": ()},
}
"""What this file and fingerprint.py use of vLLM; internals.py checks it."""
ADAPTER_FILE = "adapter_model.safetensors"
Call = Callable[[str, tuple[Any, ...]], Awaitable[Sequence[Any]]]
"""(method, arguments) -> the answer of each worker."""


@dataclass(frozen=True)
class Held:
    """modules: of the adapter's file. wrong: why a module is not held as it should be, by name."""

    modules: int
    wrong: dict[str, str]


async def compare_held(call: Call, adapter_id: int, path: Path) -> Held:
    """Compares the adapter in `path` with what each worker holds under `adapter_id`."""
    first: int | None = 0
    found: set[str] = set()
    names: set[str] = set()
    wrong: dict[str, str] = {}
    while first is not None:
        answers = await call("lorikeet_held", (adapter_id, str(path), first, CALL_BYTES))
        for answer in answers:
            found.update(answer["found"])
            names.update(answer["names"])
            wrong |= answer["wrong"]
        # Workers of a pipeline have different layers, and so different numbers of calls.
        following = [answer["next"] for answer in answers if answer["next"] is not None]
        first = min(following) if following else None
    for name in sorted(names - found - set(wrong)):
        wrong[name] = "vLLM has no such module, and left it out"
    return Held(len(names), wrong)


class HeldWeights:
    """Mixed into vLLM's worker class; its one method is called in each worker."""

    def lorikeet_held(
        self, adapter_id: int, path: str, first: int, most_bytes: int
    ) -> dict[str, Any]:
        """Compares the layers from number `first` on, as many as `most_bytes` of the file allow.

        Out: `names` of the file's modules, those of them that were `found` in a layer here, what is
        `wrong` with one, and the number of the `next` layer, or None after the last.
        """
        from safetensors import safe_open

        manager = self.model_runner.lora_manager._adapter_manager  # type: ignore[attr-defined]
        adapter = manager.get_adapter(adapter_id)
        slots = manager.lora_index_to_id
        slot = slots.index(adapter_id) if adapter_id in slots else None
        layers = list(manager.modules.items())
        found: list[str] = []
        wrong: dict[str, str] = {}
        read, number = 0, first
        with safe_open(f"{path}/{ADAPTER_FILE}", framework="pt") as file:
            keys = _factors(file.keys(), manager)
            if adapter is None:
                absent = dict.fromkeys(
                    (key[2] for key in keys.values()), "its worker has no adapter"
                )
                return _answer(keys, [], absent, None)
            while number < len(layers) and read < most_bytes:
                name, layer = layers[number]
                parts = manager.packed_modules.get(name, [name])
                pairs = [_read(file, keys.get(part), manager.lora_config) for part in parts]
                read += sum(t.nbytes for pair in pairs if pair is not None for t in pair)
                reason = _difference(layer, slot, _kept(manager, adapter, name), pairs)
                present = [keys[part][2] for part in parts if part in keys]
                found += present
                if reason is not None:
                    wrong |= dict.fromkeys(present or [name], reason)
                number += 1
        return _answer(keys, found, wrong, number if number < len(layers) else None)


def _answer(
    keys: dict[str, tuple[str, str, str]],
    found: list[str],
    wrong: dict[str, str],
    following: int | None,
) -> dict[str, Any]:
    names = [pair[2] for pair in keys.values()]
    return {"names": names, "found": found, "wrong": wrong, "next": following}


def _factors(keys: Sequence[str], manager: Any) -> dict[str, tuple[str, str, str]]:
    """vLLM's name of a module -> the file's keys of A and B, and its name in the file."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    found = {}
    ending = ".lora_A.weight"
    for key in keys:
        if key.endswith(ending):
            stem = key.removesuffix(ending)
            module = stem.removeprefix("base_model.model.")
            name = parse_fine_tuned_lora_name(key, mapper)[0]
            found[name] = (key, f"{stem}.lora_B.weight", module)
    return found


def _read(file: Any, keys: tuple[str, str, str] | None, config: Any) -> tuple[Any, Any] | None:
    """A `[rank, in]` and B `[out, rank]` in the type that vLLM keeps adapters in."""
    if keys is None:
        return None
    a, b, _ = keys
    dtype = config.lora_dtype
    return file.get_tensor(a).to(dtype), file.get_tensor(b).to(dtype)


def _kept(manager: Any, adapter: Any, name: str) -> Any:
    return manager._get_lora_layer_weights(adapter, name)


def _difference(
    layer: Any, slot: int | None, kept: Any, pairs: list[tuple[Any, Any] | None]
) -> str | None:
    """What is wrong with a layer; None when it holds exactly `pairs`, one for each of its parts."""
    if all(pair is None for pair in pairs):
        if kept is not None:
            return "vLLM holds values for it, and the adapter has none"
        if not hasattr(layer, "n_slices"):  # embeddings and head, which no adapter here has
            return None
    elif kept is None:
        return "vLLM holds no values for it"
    else:
        a, b = kept.lora_a, kept.lora_b
        halves = list(zip(a, b, strict=True)) if isinstance(a, list) else [(a, b)]
        if len(halves) != len(pairs) or not all(map(_same, halves, pairs)):
            return "vLLM's copy in memory has other values"
    if slot is None:
        return None
    try:
        expected = _as_set(layer, pairs)
    except (ValueError, IndexError, RuntimeError) as error:
        return f"it does not fit the layer ({error})"
    held = zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
    for (stack_a, stack_b), pair in zip(held, expected, strict=True):
        a, b = pair if pair is not None else (None, None)
        if not (_filled(stack_a[slot], a) and _filled(stack_b[slot], b)):
            return "the slot that requests read has other values"
    return None


def _same(held: tuple[Any, Any], pair: tuple[Any, Any] | None) -> bool:
    a, b = held
    if pair is None:
        return a is None and b is None
    return a is not None and _equal(a, pair[0]) and _equal(b, pair[1])


def _equal(held: Any, expected: Any) -> bool:
    return held.shape == expected.shape and bool((held == expected.to(held.device)).all())


def _filled(slot: Any, expected: Any) -> bool:
    """Is the matrix `expected` in the upper left corner of `slot`, and zero all around it?"""
    matrix = slot[0] if slot.dim() == 3 else slot
    if expected is None:
        return not bool(matrix.any())
    rows, columns = expected.shape
    corner = matrix[:rows, :columns]
    rest = matrix[rows:].any() | matrix[:rows, columns:].any()
    return _equal(corner, expected) and not bool(rest)


def _as_set(layer: Any, pairs: list[tuple[Any, Any] | None]) -> list[tuple[Any, Any] | None]:
    """One pair for each slice of the layer, cut as its rank holds it (vLLM's `set_lora`)."""
    if all(pair is None for pair in pairs):
        return [None] * layer.n_slices
    a: list[Any] = [pair[0] if pair is not None else None for pair in pairs]
    b: list[Any] = [pair[1] if pair is not None else None for pair in pairs]
    if layer.n_slices == 1:
        if layer.tp_size > 1:
            return [(layer.slice_lora_a(a[0]), layer.slice_lora_b(b[0]))]
        return [(a[0], b[0])]
    if len(b) == 1:  # the checkpoint holds the fused layer as one matrix
        b = list(b[0].split(list(layer.base_layer.output_sizes)))
        a = a * len(b)
    if len(b) != layer.n_slices:
        a, b = layer.expand_packed_lora(a, b)
    if layer.tp_size > 1:
        a, b = layer.slice_lora_a(a), layer.slice_lora_b(b)
    return [None if y is None else (x, y) for x, y in zip(a, b, strict=True)]
