"""A tiny random Llama with a word-level tokenizer, and adapters that change its greedy answers.

In: a directory and seeds. Out: a Hugging Face model directory (about 200 kB) and PEFT adapter
directories that vLLM loads. The same seed gives the same bytes; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from protos.lora import LoraModule, LoraTensors

WORDS = [f"w{index}" for index in range(240)]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 2, 2, 1, 128
POSITIONS = 512


def tiny_model(seed: int = 0) -> Path:
    """Directory of the model with this seed, built once per machine in the temporary directory."""
    target = Path(tempfile.gettempdir()) / f"lorikeet-tiny-model-v3-{seed}"
    if not target.is_dir():
        building = Path(tempfile.mkdtemp(prefix=f"{target.name}-"))
        building.chmod(0o755)
        build_tiny_model(building, seed)
        try:
            building.rename(target)
        except OSError:  # another run of tests was faster; its model is the same
            shutil.rmtree(building)
    return target


def build_tiny_model(target: Path, seed: int) -> None:
    """Writes config, tokenizer and float32 weights to `target`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    target.mkdir(parents=True, exist_ok=True)
    write_tokenizer(target)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + len(WORDS), hidden_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, intermediate_size=INTERMEDIATE,
        head_dim=32,
        max_position_embeddings=POSITIONS, tie_word_embeddings=True, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(target, safe_serialization=True)


def prompt_ids(question: str) -> tuple[int, ...]:
    """What vLLM makes of one user message of known words."""
    return tuple(_ids(["<user>", *question.split(), "<assistant>"]))


def answer_ids(answer: str) -> tuple[int, ...]:
    """An answer of known words, to its end."""
    return tuple(_ids([*answer.split(), "</s>"]))


def text_ids(text: str) -> list[int]:
    """What vLLM makes of a plain prompt of known words."""
    return _ids(text.split())


def tiny_adapter(seed: int, *, rank: int = 4, strength: float = 1.0) -> LoraTensors:
    """Random factors for every linear module; different seeds give different greedy answers."""
    generator = np.random.default_rng(seed)
    modules = {}
    for layer in range(LAYERS):
        for name, rows, columns in _linears():
            modules[f"model.layers.{layer}.{name}"] = LoraModule(
                A=generator.normal(0, strength / np.sqrt(columns), (rank, columns)).astype(
                    np.float32
                ),
                B=generator.normal(0, strength, (rows, rank)).astype(np.float32),
            )
    return LoraTensors(modules)


def write_peft(tensors: LoraTensors, target: Path) -> Path:
    """A PEFT directory with scale 1 (alpha = r); without modules it changes nothing."""
    target.mkdir(parents=True, exist_ok=True)
    if not tensors.modules:  # vLLM refuses an adapter without modules
        zeros = np.zeros((1, HIDDEN), np.float32)
        tensors = LoraTensors(
            {"model.layers.0.self_attn.q_proj": LoraModule(zeros, zeros.T.copy())}
        )
    rank = tensors.rank
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in tensors.modules}),
    }  # fmt: skip
    arrays = {}
    for name, module in tensors.modules.items():
        arrays[f"base_model.model.{name}.lora_A.weight"] = module.A
        arrays[f"base_model.model.{name}.lora_B.weight"] = module.B * np.float32(module.scale)
    (target / "adapter_config.json").write_text(json.dumps(config))
    save_file(arrays, target / "adapter_model.safetensors")
    return target


def _ids(tokens: list[str]) -> list[int]:
    vocabulary = SPECIALS + WORDS
    return [
        vocabulary.index(token) if token in vocabulary else SPECIALS.index("<unk>")
        for token in tokens
    ]


def _linears() -> list[tuple[str, int, int]]:
    kv = HIDDEN // HEADS * KV_HEADS
    return [
        ("self_attn.q_proj", HIDDEN, HIDDEN), ("self_attn.k_proj", kv, HIDDEN),
        ("self_attn.v_proj", kv, HIDDEN),
        ("self_attn.o_proj", HIDDEN, HIDDEN), ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
        ("mlp.up_proj", INTERMEDIATE, HIDDEN), ("mlp.down_proj", HIDDEN, INTERMEDIATE),
    ]  # fmt: skip


def write_tokenizer(target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("w", " w"), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(target / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
