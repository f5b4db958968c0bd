"""A release payload as the PEFT directory that vLLM and PEFT load.

In: LoraTensors of a release. Out: `adapter_config.json` and `adapter_model.safetensors`
(protos/peft.py). A release without modules (version 0, the base itself) becomes one module of
zeros, so that every version is served the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edge_node.disk import read_json
from edge_node.errors import AdapterError
from protos import peft
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
    for name, module in sorted(modules.items()):
        shape = (module.B.shape[0], module.A.shape[1])
        if module_shapes.get(name) != shape:
            raise AdapterError(
                f"Release module {name!r} is {shape[0]}x{shape[1]}; the base model here has "
                f"{module_shapes.get(name)}. The release belongs to another base: check "
                "EDGE_BASE__PATH."
            )
    return peft.peft_files(LoraTensors(modules))


def directory_rank(folder: Path) -> int:
    """Rank of the adapter in a PEFT directory; raises AdapterError when it cannot be read."""
    try:
        return int(read_json(folder / peft.CONFIG)["r"])
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
