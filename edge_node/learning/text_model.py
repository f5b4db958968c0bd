"""The base's text model in transformers, as rounds train it (importing this module loads torch).

In: a base model directory. Out: the model in float32, or its linear modules alone. A text model
inside a wrapper is taken out of it. `Layout.text_name` says what its modules are called here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edge_node.errors import SettingsError
from protos.base import WRAPPER_PREFIXES, read_layout

_RENAMES = {rf"^{re.escape(prefix)}": "model." for prefix in WRAPPER_PREFIXES} | {
    r"^language_model\.lm_head": "lm_head"
}


def load_text_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The text model with its weights in `dtype`.

    Raises SettingsError when the checkpoint does not have all of them.
    """
    wrapped = bool(read_layout(path).wrapper_prefix)
    model, loading = AutoModelForCausalLM.from_pretrained(
        path, config=_config(path), key_mapping=_RENAMES if wrapped else None, dtype=dtype,
        local_files_only=True, output_loading_info=True,
    )  # fmt: skip
    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, the first is "
            f"{missing[0]}. Download the model again."
        )
    return model


def trained_modules(path: Path) -> dict[str, tuple[int, int]]:
    """The text model's linear modules, name -> (out_features, in_features); loads no weight.

    Raises:
        ValueError: transformers has no text model of this kind.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(path))
    linear = (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    )
    return {name: (module.out_features, module.in_features) for name, module in linear}


def _config(path: Path) -> Any:
    config, layout = AutoConfig.from_pretrained(path, local_files_only=True), read_layout(path)
    if layout.wrapper_prefix:
        config = config.get_text_config()
        # The wrapper's own word on this and its text model's differ: what is stored tells.
        config.tie_word_embeddings = not layout.has_head
    return config
