"""Identity of a base model: a digest over weights, tokenizer and config, and the shapes that LoRA may target.

In: a Hugging Face model directory. Out: BaseModelInfo. Reads safetensors headers only; imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path

IDENTITY_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "quantization_config.json",
)  # fmt: skip


class BaseModelError(ValueError):
    """The directory is not a usable base model; the message says what is missing."""


@dataclass(frozen=True)
class BaseModelInfo:
    """digest: 64 hex digits; module_shapes: LoRA-targetable linear modules, name -> (out_features, in_features)."""

    path: Path
    digest: str
    module_shapes: dict[str, tuple[int, int]]


def read_base_model(path: Path) -> BaseModelInfo:
    """Digest and module shapes of the base model at `path`; raises BaseModelError."""
    if not path.is_dir():
        raise BaseModelError(f"Base model directory {path} does not exist. Set it to a Hugging Face model directory.")
    weights = sorted(path.glob("*.safetensors"))
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if not weights:
        missing.append("*.safetensors")
    if missing:
        raise BaseModelError(
            f"{path} is not a base model directory: {', '.join(missing)} not found. "
            "Expected config.json, tokenizer.json and safetensors weights."
        )
    total = hashlib.sha256()
    for file in [path / name for name in IDENTITY_FILES if (path / name).is_file()] + weights:
        with file.open("rb") as stream:
            total.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    shapes: dict[str, tuple[int, int]] = {}
    for file in weights:
        shapes.update(_linear_shapes(file))
    return BaseModelInfo(path, total.hexdigest(), shapes)


def _linear_shapes(file: Path) -> dict[str, tuple[int, int]]:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        try:
            header = json.loads(stream.read(struct.unpack("<Q", prefix)[0]))
            tensors = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (
            struct.error,
            ValueError,
            OverflowError,
            MemoryError,
            RecursionError,
            AttributeError,
            KeyError,
            TypeError,
        ) as error:
            raise BaseModelError(f"{file} is not a safetensors file: its header cannot be read.") from error
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in tensors.items():
        if not name.endswith(".weight") or len(shape) != 2:
            continue
        module = name.removesuffix(".weight")
        if "embed" not in module and not module.endswith("lm_head"):
            shapes[module] = shape
    return shapes
