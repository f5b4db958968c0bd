"""Families of base models that were seen to work: served with LoRA, trained and merged.

In: the architecture that config.json names. Out: the linear modules of each of its layers. They
were seen in tests/integration/test_families.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = frozenset(
    (*_ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)

FAMILIES: dict[str, frozenset[str]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Ministral3ForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _LLAMA,
    "Gemma3ForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "Olmo2ForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "CohereForCausalLM": _LLAMA,
    "Exaone4ForCausalLM": _LLAMA,
    "NemotronForCausalLM": _LLAMA - {"mlp.gate_proj"},
    "Phi3ForCausalLM": frozenset(
        ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "GPTNeoXForCausalLM": frozenset(
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    ),
    "OPTForCausalLM": frozenset((*_ATTENTION, "self_attn.out_proj", "fc1", "fc2")),
    "Starcoder2ForCausalLM": frozenset((*_ATTENTION, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj")),
}
"""Architecture -> names of the modules within a layer."""
_IN_LAYER = re.compile(r"(?:.*\.)?(\d+)\.([A-Za-z_].*)")


def missing_module(architecture: str, layers: int, modules: Iterable[str]) -> str | None:
    """The first module that the family has and `modules` lacks, like `3.mlp.up_proj`.

    None for another family.
    """
    if architecture not in FAMILIES:
        return None
    found = _by_layer(modules)
    wanted = sorted(FAMILIES[architecture])
    return next(
        (f"{n}.{name}" for n in range(layers) for name in wanted if name not in found[n]), None
    )


def is_known(architecture: str, layers: int, modules: Iterable[str]) -> bool:
    """True when there are `layers` layers, each with the modules of its family and no others."""
    found = _by_layer(modules)
    return len(found) == layers and all(
        names == FAMILIES.get(architecture, set()) for names in found.values()
    )


def _by_layer(modules: Iterable[str]) -> dict[int, set[str]]:
    layers: dict[int, set[str]] = defaultdict(set)
    for module in modules:
        if match := _IN_LAYER.fullmatch(module):
            layers[int(match[1])].add(match[2])
    return layers
