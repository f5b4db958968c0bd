"""Made-up base models of a few kilobytes, for the checks that read config and headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def layers(count: int = 2, prefix: str = "model.", dtype: Any = np.float32) -> dict[str, Any]:
    names = [f"{prefix}layers.{n}.{module}.weight" for n in range(count) for module in LLAMA]
    tensors = {name: np.zeros((4, 4), dtype) for name in names}
    return tensors | {
        f"{prefix}embed_tokens.weight": np.zeros((8, 4), dtype),
        f"{prefix}norm.weight": np.zeros(4, dtype),
    }


def make(path: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A single-file model; `config` is put over a Llama of two layers."""
    path.mkdir()
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(llama | config))
    (path / "tokenizer.json").write_text("{}")
    save_file(layers() if tensors is None else tensors, path / "model.safetensors")
    return path


def shard(path: Path) -> Path:
    """The same model in two files with an index."""
    tensors = layers()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, path / file)
    (path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
