"""Identity of a base model, and whether it can be served with LoRA, trained and merged.

In: a Hugging Face model directory. Out: BaseModelInfo, or BaseModelError with the reason. Reads
config.json, the index and safetensors headers, and hashes the files; imports no torch. Central has
no more than this; a node also asks vLLM and PEFT (edge_node/base_model.py). Which families work is
in protos/README.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.checkpoint import (
    BaseModelError,
    TensorInfo,
    expect_no_pointer,
    read_json,
    read_tensors,
    unreadable,
    weight_files,
)
from protos.digests import Digests
from protos.families import is_known, missing_module

__all__ = ["BaseModelError", "BaseModelInfo", "Layout", "read_base_model", "read_layout"]

IDENTITY_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "quantization_config.json",
)  # fmt: skip
MEMORY_FILE = "base-digests.json"
"""Where a program remembers digests, in its own data directory."""
WRAPPERS = ("gemma3", "llava", "mistral3")
"""Model types whose language model is served and trained alone."""
WRAPPED_TEXT = {
    "gemma3_text": "Gemma3ForCausalLM", "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
"""Model types of the text models inside them -> their architectures."""
WRAPPER_PREFIXES = ("language_model.model.", "model.language_model.")
"""How a checkpoint calls the language model inside a wrapper.

The model alone calls itself `model.`.
"""
TRANSPOSED = ("gpt2", "openai-gpt")
"""Model types that store [in_features, out_features]."""
WITHOUT_LORA = frozenset((
    "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BloomForCausalLM",
    "Cohere2MoeForCausalLM",
    "DbrxForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM",
    "Gemma3nForCausalLM", "Glm5NextForCausalLM", "HCXVisionV2ForCausalLM", "HrmTextForCausalLM",
    "IQuestLoopCoderForCausalLM", "KimiLinearForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM",
    "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "MiniMaxM3SparseForCausalLM", "OrionForCausalLM",
    "StableLmForCausalLM", "Step1ForCausalLM", "Step3TextForCausalLM", "Step3p5ForCausalLM",
    "Zamba2ForCausalLM",
))  # fmt: skip
"""Text models that vLLM 0.32 serves without LoRA; a contract test compares this with vLLM itself.
"""
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_EXPERTS = re.compile(r"(^|\.)(experts|shared_experts?|block_sparse_moe|moe)\.")
_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_scale_2|absmax|weight_blocks|\w+_proj_blocks"
    r"|SCB|quant_map)$|\.weight\.(absmax|quant_\w+|nested_\w+)"
)
_PLAIN = ("F16", "BF16", "F32", "F64")
_LINEAR = re.compile(r"(.*\.\d+\.(?:.*\.)?[A-Za-z_]\w*)\.weight")
_NOT_TRAINED = re.compile(r"(^|\.)(mtp|mtp_layers|\w*embed\w*|lm_head)(\.|$)")
"""Parts for guessing several tokens at once, which transformers does not have, and embeddings."""


@dataclass(frozen=True)
class BaseModelInfo:
    """digest: 64 hex digits.

    module_shapes: LoRA-targetable linear modules, name -> (out_features, in_features).
    """

    path: Path
    digest: str
    module_shapes: Mapping[str, tuple[int, int]]
    is_wrapped: bool = False
    """The text model is inside a wrapper (for images), and is served and trained without it."""
    is_known: bool = False
    """Its family was seen to work whole, so a node need not ask vLLM and PEFT."""


@dataclass(frozen=True)
class Layout:
    """What config and headers say.

    module_shapes: as in BaseModelInfo, by the checkpoint's names.
    """

    files: list[Path]
    module_shapes: Mapping[str, tuple[int, int]]
    wrapper_prefix: str = ""
    """The checkpoint's name of the language model inside a wrapper; empty where there is none."""
    is_known: bool = False
    has_head: bool = True
    """The checkpoint holds `lm_head`; without it the embeddings serve as head."""

    def text_name(self, module: str) -> str:
        """The name of a module in the language model alone, as transformers and PEFT call it."""
        return (
            f"model.{module.removeprefix(self.wrapper_prefix)}" if self.wrapper_prefix else module
        )

    def base_name(self, module: str) -> str:
        """The opposite of `text_name`: the checkpoint's name, which updates and releases use."""
        return (
            f"{self.wrapper_prefix}{module.removeprefix('model.')}"
            if self.wrapper_prefix
            else module
        )


def read_base_model(path: Path, memory: Path | None = None) -> BaseModelInfo:
    """Digest and module shapes of the base model at `path`.

    Args:
        memory: the caller's data directory, where digests of unchanged files are remembered.
            None: hash every file.

    Raises:
        BaseModelError: the directory is no base model that works here, or cannot be read.
    """
    digests = Digests(None if memory is None else memory / MEMORY_FILE)
    total = hashlib.sha256()
    try:
        layout = read_layout(path)
        for file in [
            path / name for name in IDENTITY_FILES if (path / name).is_file()
        ] + layout.files:
            total.update(f"{file.name}\0{digests.of(file)}\n".encode())
    except OSError as error:
        raise unreadable(path, error) from error
    digests.save()
    return BaseModelInfo(
        path, total.hexdigest(), layout.module_shapes, bool(layout.wrapper_prefix), layout.is_known
    )


def read_layout(path: Path) -> Layout:
    """Files and modules of the base model at `path`, by config and headers alone.

    Raises BaseModelError, OSError.
    """
    if not path.is_dir():
        raise BaseModelError(
            f"Base model directory {path} does not exist. Set it to a Hugging Face model directory."
        )
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if not any(path.glob("*.safetensors*")) and missing:
        missing.append("*.safetensors")
    if missing:
        raise BaseModelError(
            f"{path} is not a base model directory: {', '.join(missing)} not found. "
            "Expected config.json, tokenizer.json and safetensors weights."
        )
    _expect_tokenizer(path / "tokenizer.json")
    config = read_json(path / "config.json")
    files = weight_files(path)
    tensors = read_tensors(path, files)
    for reason in (_wrong_kind(config), _quantised(config, tensors), _experts(config, tensors)):
        if reason:
            raise BaseModelError(f"Base model {path} does not work here: {reason}")
    prefix = _wrapper_prefix(path, config, tensors)
    shapes = _linear_shapes(
        path, {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    architecture = "" if prefix else next(iter(config.get("architectures") or []), "")
    layers = config.get("num_hidden_layers")
    layers = layers if isinstance(layers, int) else 0
    if lacking := missing_module(architecture, layers, shapes):
        number, _, module = lacking.partition(".")
        raise BaseModelError(
            f"{path} is not whole: layer {number} of {layers} has no {module}, which "
            f"{architecture} needs. Download the model again."
        )
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    return Layout(files, shapes, prefix, is_known(architecture, layers, shapes), has_head)


def _expect_tokenizer(file: Path) -> None:
    """The whole file is tens of megabytes: its two ends tell whether it was cut."""
    expect_no_pointer(file)
    with file.open("rb") as stream:
        begin = stream.read(64).lstrip()[:1]
        stream.seek(max(0, file.stat().st_size - 64))
        if (begin, stream.read().rstrip()[-1:]) != (b"{", b"}"):
            raise BaseModelError(f"{file} is not a whole JSON object. Download it again.")


def _wrong_kind(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(
        isinstance(name, str) for name in architectures
    ):
        return (
            f"config.json names the architectures {architectures!r}; expected a list of names. "
            "Download it again."
        )
    if architectures and not any(name.endswith(_GENERATES) for name in architectures):
        return (
            f"{architectures[0]} does not generate text. Expected a model like LlamaForCausalLM; "
            "choose another base."
        )
    if config.get("is_encoder_decoder"):
        return (
            "it has an encoder and a decoder. Expected a decoder alone, like Llama; choose another "
            "base."
        )
    if config.get("model_type") in TRANSPOSED:
        return (
            f"{config['model_type']} stores its matrices transposed, which is not supported. "
            "Choose another base."
        )
    if without := [name for name in architectures if name in WITHOUT_LORA]:
        return (
            f"vLLM serves {without[0]} without LoRA, so no adapter could be loaded. Choose another "
            "base."
        )
    if weights := config.get("transformers_weights"):
        return (
            f"config.json says that its weights are in {weights!r}, which vLLM does not read. "
            "Remove that entry."
        )
    return ""


def _quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    settings = [
        part.get("quantization_config") or part.get("compression_config") for part in _parts(config)
    ]
    found = next((text for value in settings if value for text in [_method(value)]), None)
    if found is None:
        found = next((f"tensor {name}" for name in sorted(tensors) if _PACKED.search(name)), None)
    if found is None:
        odd = (
            n for n in sorted(tensors) if _LINEAR.fullmatch(n) and tensors[n].dtype not in _PLAIN
        )
        found = next((f"tensor {name} in {tensors[name].dtype}" for name in odd), None)
    if found is None:
        return ""
    return (
        f"its weights are stored quantised ({found}), so a release cannot be merged into them. "
        "Take the model's unquantised checkpoint (BF16, F16 or F32); vLLM quantises it for serving "
        "with --quantization in EDGE_SERVING__EXTRA_ARGS."
    )


def _method(settings: Any) -> str:
    return (
        str(settings.get("quant_method", "quantization_config"))
        if isinstance(settings, dict)
        else str(settings)
    )


def _experts(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str:
    found = next((name for name in sorted(tensors) if _EXPERTS.search(name)), None)
    counts = [(key, part.get(key)) for part in _parts(config) for key in _EXPERT_COUNTS]
    if found is None:
        found = next(
            (f"{key} is {count}" for key, count in counts if type(count) is int and count > 1), None
        )
    if found is None:
        return ""
    return (
        f"it is a mixture of experts ({found}). Adapters of experts are not trained, merged or "
        "served here; choose a dense base."
    )


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and those of the models inside it."""
    return [
        config,
        *(
            value
            for key, value in config.items()
            if key.endswith("_config") and isinstance(value, dict)
        ),
    ]


def _wrapper_prefix(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> str:
    inner = [key for key in ("text_config", "llm_config", "language_config", "vision_config",
                             "audio_config",
                             "thinker_config") if isinstance(config.get(key), dict)]  # fmt: skip
    if not inner:
        return ""
    kind, text = config.get("model_type"), config.get("text_config")
    text_kind = str(text.get("model_type")) if isinstance(text, dict) else None
    found = [p for p in WRAPPER_PREFIXES if any(name.startswith(f"{p}layers.") for name in tensors)]
    if kind in WRAPPERS and text_kind in WRAPPED_TEXT and len(found) == 1:
        return found[0]
    raise BaseModelError(
        f"Base model {path} does not work here: it holds a text model {text_kind!r} inside "
        f"{kind!r} ({inner[0]} in config.json, tensor {min(tensors)}). The text models "
        f"{', '.join(WRAPPED_TEXT)} are found inside {', '.join(WRAPPERS)}, with tensors "
        f"{' or '.join(f'{prefix}*' for prefix in WRAPPER_PREFIXES)}. Choose a base that is a text "
        "model alone."
    )


def _linear_shapes(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _LINEAR.fullmatch(name)
        if match and len(tensor.shape) == 2 and not _NOT_TRAINED.search(name):
            shapes[match[1]] = (tensor.shape[0], tensor.shape[1])
    if not shapes:
        raise BaseModelError(
            f"Base model {path} does not work here: of its {len(tensors)} tensors (the first is "
            f"{min(tensors)}) none is the matrix of a numbered layer, like "
            "model.layers.0.self_attn.q_proj.weight. Choose another base."
        )
    return shapes
