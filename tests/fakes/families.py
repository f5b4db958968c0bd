"""A tiny random model of each family of base models, with the word-level tokenizer of `tiny_model`.

In: a family's name and a directory. Out: a Hugging Face model directory of about a megabyte.
Nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from tests.fakes.tiny_model import SPECIALS, WORDS, write_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": len(SPECIALS) + len(WORDS), "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "float32",
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

WORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "starcoder2": {},
    "granite": {},
    "olmo2": {},
    "smollm3": {},
    "cohere": {},
    "nemotron": {},
    "exaone4": {},
}  # fmt: skip
"""Model type -> what its config has besides TEXT."""
NEWLY_CHECKED: dict[str, dict[str, Any]] = {"glm4": {}}
"""Families that a node asks vLLM and PEFT about.

The modules that both know are trained (here not the fused gate_up_proj).
"""
REFUSED_BY_VLLM: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"], "says": "Qwen3_5ForCausalLM",
    },
}  # fmt: skip
"""Text models that this vLLM does not serve, and what the message must say."""
REFUSED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                  "says": "mixture of experts"},
    "mixtral": {"num_local_experts": 4, "says": "mixture of experts"},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "says": "transposed"},
    "bloom": {"n_layer": 2, "n_head": 2, "says": "BloomForCausalLM without LoRA"},
    "stablelm": {"says": "StableLmForCausalLM without LoRA"},
}  # fmt: skip
"""Text models that central refuses already, by config and headers, and what the message must say.
"""
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", "query_pre_attn_scalar": 32},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {"text_config": {"model_type": "mistral"}},
    "llava": {"text_config": {"model_type": "llama"}},
}
_TOWERS = {"gemma3": "siglip_vision_model", "mistral3": "pixtral", "llava": "clip_vision_model"}


def build_family(family: str, target: Path, seed: int = 0) -> Path:
    """Writes config, tokenizer and float32 weights of `family` to `target`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    target.mkdir(parents=True, exist_ok=True)
    write_tokenizer(target)
    torch.manual_seed(seed)
    if family in WRAPPED:
        own = dict(WRAPPED[family])
        text = TEXT | own.pop("text_config")
        vision = VISION | {"model_type": _TOWERS[family]}
        config = AutoConfig.for_model(
            family, text_config=text, vision_config=vision, image_token_index=5, **own
        )
        model = AutoModelForImageTextToText.from_config(config)
    else:
        options = TEXT | (WORKS | NEWLY_CHECKED | REFUSED_BY_VLLM | REFUSED)[family]
        config = AutoConfig.for_model(
            family,
            **{key: value for key, value in options.items() if value is not None and key != "says"},
        )
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.float32).save_pretrained(target, safe_serialization=True)
    return target


def shard_beside_mistrals_own_format(base: Path) -> None:
    """Two files and an index instead of one file.

    Mistral's repositories hold other files of weights beside them.
    """
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, base / file, metadata={"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: file for file, held in parts.items() for name in held},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").unlink()
    save_file(
        {name: array * 0 for name, array in tensors.items()}, base / "consolidated.safetensors"
    )
    for name in ("params.json", "tekken.json"):
        (base / name).write_text("{}")
