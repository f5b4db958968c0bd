"""Does a PEFT directory fit the base model?

In: two directories; reads safetensors headers only. Out: nothing, or a ServingError that names the
tensor. vLLM loads an adapter with unknown layers or wrong shapes without a word and then answers
with something else (tried with 0.32.0).
"""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from edge_node.errors import ServingError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def check_adapter(adapter: Path, base: Path) -> None:
    """Raises ServingError unless each tensor of `adapter` fits a module of `base`."""
    missing = [file for file in ADAPTER_FILES if not (adapter / file).is_file()]
    if missing:
        raise ServingError(f"{adapter} is not a PEFT directory: {', '.join(missing)} not found.")
    factors = _shapes(adapter / ADAPTER_FILES[1])
    weights = {
        name: shape
        for file in sorted(base.glob("*.safetensors"))
        for name, shape in _shapes(file).items()
    }
    if not factors:
        raise ServingError(
            f"{adapter} has no tensors; vLLM needs one module at least (of zeros for the base "
            "itself)."
        )
    for name, shape in factors.items():
        match = KEY.fullmatch(name)
        weight = weights.get(f"{match['module']}.weight") if match else None
        if match is None or weight is None:
            raise ServingError(
                f"{adapter}: tensor {name!r} belongs to no module of the base model {base}."
            )
        axis = 1 if match["factor"] == "A" else 0
        if len(shape) != 2 or shape[axis] != weight[axis]:
            expected = f"[rank, {weight[1]}]" if match["factor"] == "A" else f"[{weight[0]}, rank]"
            raise ServingError(
                f"{adapter}: tensor {name!r} has shape {shape}; expected {expected}."
            )


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
            return {name: list(tensors.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ServingError(f"{file} is not a readable safetensors file: {error}.") from error
