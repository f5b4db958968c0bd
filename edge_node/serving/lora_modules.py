"""Which modules of a base vLLM serves adapters for, without loading a weight.

In: a base model directory. Out: module names as the checkpoint has them. Builds vLLM's model and
its LoRA manager on the meta device, in a process of its own (edge_node/base_check.py): it sets up
vLLM's global state.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_node.serving import language_model
from protos.base import BaseModelError, Layout


def served_modules(path: Path, layout: Layout) -> set[str]:
    """Those of the layout's modules that a LoRA in vLLM may target.

    Raises BaseModelError naming the model class.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.lora.model_manager import create_lora_manager
    from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
    from vllm.model_executor.models import supports_lora

    overrides: dict[str, Any] = {}
    if layout.wrapper_prefix:
        language_model.register()
        overrides = {"architectures": [language_model.architecture(path)]}
    _expect_importable(path, overrides)
    config = EngineArgs(
        model=str(path), hf_overrides=overrides, config_format="hf", tokenizer_mode="hf",
        enforce_eager=True, max_model_len=128, enable_lora=True, max_loras=1, max_lora_rank=8,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        initialize_model_parallel(1, 1)
        found, _ = get_model_architecture(config.model_config)
        if not supports_lora(found):
            raise BaseModelError(
                f"vLLM serves {found.__name__} without LoRA, so no adapter could be loaded"
            )
        with torch.device("meta"):
            model = initialize_model(config)
            vocabulary = config.model_config.get_vocab_size()
            manager = create_lora_manager(
                model, 1, 16, vocabulary, config.lora_config, config, torch.device("meta")
            )
    packed = manager.packed_modules
    names = set(manager.modules) - set(packed) | {
        name for parts in packed.values() for name in parts
    }
    return _known(layout.module_shapes, names, getattr(model, "hf_to_vllm_mapper", None))


def _known(modules: Iterable[str], names: set[str], mapper: Any) -> set[str]:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    renames = None if mapper is None else mapper.get_rename_mapper()
    known = set()
    for module in modules:
        if (
            parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", renames)[0]
            in names
        ):
            known.add(module)
    return known


def _expect_importable(path: Path, overrides: dict[str, Any]) -> None:
    """vLLM itself only says that the class failed to be inspected."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    names = (
        overrides.get("architectures")
        or AutoConfig.from_pretrained(path, local_files_only=True).architectures
    )
    for name in names or []:
        try:
            if name in ModelRegistry.models:
                ModelRegistry.models[name].load_model_cls()
        except ImportError as error:
            raise BaseModelError(f"vLLM cannot load its class {name}: {error}") from error
