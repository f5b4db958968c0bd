"""An adapter as the PEFT directory that vLLM and PEFT load.

In: LoraTensors. Out: the contents of `adapter_config.json` and `adapter_model.safetensors`. Exact:
scales go into B, so that alpha is r, and modules of lower rank are padded with zeros, because vLLM
reads one rank for all.
"""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save

from protos.lora import LoraTensors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def peft_files(adapter: LoraTensors) -> dict[str, bytes]:
    """File name -> content.

    Args:
        adapter: at least one module, with float32 factors A [rank, in_features] and
            B [out_features, rank].

    Raises:
        ValueError: the adapter has no module, and PEFT loads no such directory.
    """
    if not adapter.modules:
        raise ValueError("The adapter has no module. Expected at least one.")
    rank = adapter.rank
    tensors: dict[str, np.ndarray] = {}
    for name, module in sorted(adapter.modules.items()):
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
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in adapter.modules}),
    }
    return {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: json.dumps(config, indent=1, sort_keys=True).encode(),
    }
