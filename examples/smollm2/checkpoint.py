"""SmolLM2's GGUF file as a Hugging Face model directory.

In: the .gguf that the package ships (Q4_1 matrices, a Q8_0 embedding, float32 norms). Out:
config.json, model.safetensors (bfloat16) and the tokenizer with its chat template. The weights are
exactly the dequantised ones, rounded to bfloat16: a mean log-probability of -3.834 a token of
English text, against -3.830 before the rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML. The file's own template begins every prompt with a system turn of 25 tokens; the base
answers as many questions without it (40 of 64, and 37 with it)."""

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_CONTROL_TOKEN = 3
"""GGUF's token type of `<|im_start|>` and its like."""


def convert(file: Path, directory: Path) -> None:
    """Write the model in `file` into `directory`; takes 6 seconds of one core."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    dequantised = (
        (tensor.name, dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors
    )
    heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    weights = {
        # The norms still lie in the file, which torch would take for writable.
        name: torch.from_numpy(values.copy()).to(torch.bfloat16)
        for name, values in hugging_face_tensors(dequantised, *heads)
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(fields), indent=2) + "\n")
    save_tokenizer(fields, directory)


def hugging_face_tensors(
    tensors: Iterable[tuple[str, NDArray[np.float32]]], heads: int, kv_heads: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each tensor under its name in LlamaForCausalLM, with the rows of q and k in its order.

    Args:
        tensors: GGUF name and values, float32 [out_features, in_features] or [features].
        heads: query heads.
        kv_heads: key and value heads.

    Raises:
        ValueError: a name is none of a Llama model with tied embeddings.
    """
    rows_of = {"attn_q": heads, "attn_k": kv_heads}
    for name, values in tensors:
        if name in _TOP_NAMES:
            yield _TOP_NAMES[name], values
            continue
        _, layer, kind, suffix = name.split(".") if name.count(".") == 3 else ("", "", name, "")
        if kind not in _LAYER_NAMES or suffix != "weight":
            raise ValueError(
                f"Tensor {name!r} has no place in a Llama model with tied embeddings; expected "
                f"{', '.join(_TOP_NAMES)}, or blk.N.KIND.weight with KIND one of "
                f"{', '.join(_LAYER_NAMES)}."
            )
        if kind in rows_of:
            values = halves_from_pairs(values, rows_of[kind])
        yield f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight", values


def halves_from_pairs(weights: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Order the rows of a q or k matrix for the rotary embedding of transformers and vLLM.

    They rotate row i of a head with row i + d/2. A GGUF of a Llama model has the two beside each
    other. `weights`: float32 [heads * d, in_features].
    """
    rows, columns = weights.shape
    pairs = weights.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of LlamaForCausalLM from the file's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": fields["llama.vocab_size"],
        "rope_theta": fields["llama.rope.freq_base"],
        # Stored as float32: 9.999999747378752e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def save_tokenizer(fields: Mapping[str, Any], directory: Path) -> None:
    """Write the byte-level BPE of the file's metadata, as transformers and vLLM load it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: Sequence[str] = fields["tokenizer.ggml.tokens"]
    kinds: Sequence[int] = fields["tokenizer.ggml.token_type"]
    pairs = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
