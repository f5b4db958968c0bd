"""A release payload as the PEFT directory that vLLM and PEFT load.

In: LoraTensors of a release (scale 1.0). Out: `adapter_config.json` and
`adapter_model.safetensors`. Exact: modules of lower rank are padded with zeros (vLLM reads one rank
for all), and a release without modules (version 0, the base itself) becomes one module of zeros, so
that every version is served the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edge_node.disk import read_json
from edge_node.errors import AdapterError
from protos.lora import LoraModule, LoraTensors

EMPTY_RANK = 8


def peft_files(
    release: LoraTensors, module_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, bytes]:
    """File name -> content.

    Args:
        release: factors float32 A [rank, in_features], B [out_features, rank].
        module_shapes: the base's linear modules, name -> (out_features, in_features).

    Raises:
        AdapterError: a module is not in the base or does not fit it.
    """
    modules = dict(release.modules) or _zeros(module_shapes)
    rank = max(module.rank for module in modules.values())
    tensors: dict[str, np.ndarray] = {}
    for name, module in sorted(modules.items()):
        shape = (module.B.shape[0], module.A.shape[1])
        if module_shapes.get(name) != shape:
            raise AdapterError(
                f"Release module {name!r} is {shape[0]}x{shape[1]}; the base model here has "
                f"{module_shapes.get(name)}. The release belongs to another base: check "
                "EDGE_BASE__PATH."
            )
        spare = rank - module.rank
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = np.pad(module.A, ((0, spare), (0, 0)))
        tensors[f"{prefix}.lora_B.weight"] = np.pad(
            module.B * np.float32(module.scale), ((0, 0), (0, spare))
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    return {
        "adapter_model.safetensors": save(tensors, metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(config, indent=1, sort_keys=True).encode(),
    }


def directory_rank(folder: Path) -> int:
    """Rank of the adapter in a PEFT directory; raises AdapterError when it cannot be read."""
    try:
        return int(read_json(folder / "adapter_config.json")["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder} is not a PEFT directory: {error!r}. The release is downloaded again."
        ) from error


def _zeros(module_shapes: Mapping[str, tuple[int, int]]) -> dict[str, LoraModule]:
    if not module_shapes:
        raise AdapterError("The base model has no linear module that LoRA could target.")
    name = min(module_shapes)
    out_features, in_features = module_shapes[name]
    a = np.zeros((EMPTY_RANK, in_features), np.float32)
    return {name: LoraModule(a, np.zeros((out_features, EMPTY_RANK), np.float32))}
