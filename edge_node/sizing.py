"""What a round of training needs beside vLLM, estimated from settings and the base's headers.

In: settings and base. Out: a few sentences for `edge-node doctor`; SettingsError where a round
could not start. Loads no weight and no torch. The figures are estimates: they were fitted to models
of 42 and 135 million parameters on a CPU (benchmarks/training.py) and came within 10 % of their
memory. Time depends on what else runs.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_node import vllm_arguments
from edge_node.learning.compute import choose_device, count_parameters, cuda_bytes, training_dtype
from edge_node.learning.reports import expect_tensorboard
from edge_node.learning.targets import targeted
from edge_node.serving import kv_cache_bytes
from edge_node.settings import EdgeSettings
from protos.base import BaseModelInfo

ROW_TOKENS = 256
"""Assumed length of an example where EDGE_SERVING__MAX_MODEL_LEN allows it."""
LEARNER_BYTES = 700 << 20
"""A learner with its libraries, before it loads a model."""
VLLM_BYTES = 1200 << 20
"""A vLLM on CPU without weights and KV cache."""
WEIGHT_BYTES = 8
"""Of each parameter: float32, and as much again for the mapped checkpoint and bfloat16 copies."""
OPTIMIZER_BYTES = 16
"""Of each trained number: itself, its gradient and two moments of Adam, float32."""
KEPT_BYTES = {"float32": 4.0, "bfloat16": 1.2}
"""Of each input and output of a linear module, for each token, until the backward pass."""
HEAD_TOKENS, HEAD_WORDS, HEAD_BYTES = 4096, 32768, 32
"""TRL's largest tile of logits, and the bytes of each while it is worked on (8 float32). On CPU it
scores every token of a pass, not only answers: a megabyte a token, more than all layers of a small
model keep.
"""
GPU_SHARE = 0.92
"""vLLM's own default of --gpu-memory-utilization."""
EFFICIENCY = 0.7
"""Of the rate of a large product of matrices."""
BFLOAT16_SPEED = 1.6
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Estimate:
    """Of one round. tokens: of a step. memory_bytes: the learner's peak, on its device."""

    parameters: int
    trained: int
    tokens: int
    memory_bytes: int
    flops: float


def expect_trainable(settings: EdgeSettings, base: BaseModelInfo) -> None:
    """Raises SettingsError for modules, a GPU or a package that are not there. May block for
    seconds.
    """
    expect_tensorboard(settings.learning.tensorboard)
    targeted(settings.learning.target_modules, base.module_shapes)
    if settings.learning.device == "cuda":
        choose_device("cuda", cuda_bytes)


def describe(settings: EdgeSettings, base: BaseModelInfo) -> str:
    """What a round trains, on what, and whether that fits; raises as `expect_trainable`."""
    learning = settings.learning
    expect_tensorboard(learning.tensorboard)
    modules = targeted(learning.target_modules, base.module_shapes)
    gpu_bytes = 0 if learning.device == "cpu" else cuda_bytes()
    device = choose_device(learning.device, lambda: gpu_bytes)
    dtype = training_dtype(learning.dtype, count_parameters(base.path))
    need = estimate(settings, base, dtype)
    text = (
        f"{_millions(need.parameters)} parameters in {dtype} on {device}, {len(modules)} modules "
        f"with {_millions(need.trained)} trained numbers; estimated for steps of "
        f"{need.tokens} tokens: {_gb(need.memory_bytes)}"
    )
    if device == "cpu":
        rate = matmul_rate() * EFFICIENCY * (BFLOAT16_SPEED if dtype == "bfloat16" else 1.0)
        text += f", {need.flops / rate:.0f} s a round"
        free, whole = memory_bytes() - vllm_bytes(settings, base), memory_bytes()
    else:
        text += " (nothing was measured on a GPU)"
        free, whole = int(gpu_bytes * (1 - _gpu_share(settings))), gpu_bytes
    if need.memory_bytes > free:
        text += (
            f". That does not fit beside vLLM, which leaves {_gb(max(free, 0))} of {_gb(whole)}: "
            "set EDGE_LEARNING__BATCH_TOKENS or EDGE_LEARNING__GRADIENT_CHECKPOINTING, or give "
            "vLLM less"
        )
    return text


def estimate(settings: EdgeSettings, base: BaseModelInfo, dtype: str) -> Estimate:
    """Memory: weights, states of the factors; activations and logits of the longest pass."""
    learning = settings.learning
    parameters = count_parameters(base.path)
    features = {name: sum(shape) for name, shape in base.module_shapes.items()}
    trained = learning.rank * sum(
        features[name] for name in targeted(learning.target_modules, features)
    )
    anchors = learning.batch_anchor if any(spec.anchor for spec in settings.environments) else 0
    row = min(ROW_TOKENS, settings.serving.max_model_len or ROW_TOKENS)
    tokens = (learning.batch_own + anchors) * row
    in_pass = min(tokens, max(learning.batch_tokens or tokens, row))
    kept = KEPT_BYTES[dtype] * sum(features.values()) * in_pass
    if learning.gradient_checkpointing:
        kept /= 4
    head = HEAD_BYTES * min(in_pass, HEAD_TOKENS) * min(_vocabulary(base), HEAD_WORDS)
    memory = LEARNER_BYTES + WEIGHT_BYTES * parameters + OPTIMIZER_BYTES * trained + kept + head
    # Forward, and backward to the activations: the base's own weights have no gradient.
    passes = 6 if learning.gradient_checkpointing else 4
    return Estimate(
        parameters, trained, tokens, int(memory), passes * parameters * tokens * learning.steps
    )


def vllm_bytes(settings: EdgeSettings, base: BaseModelInfo) -> int:
    """Memory of vLLM on CPU: process, weights in the type that it serves, KV cache."""
    width = 4 if settings.serving.dtype in ("float", "float32") else 2
    cache = kv_cache_bytes(settings, base) or 1 << 30
    return VLLM_BYTES + width * count_parameters(base.path) + cache


def memory_bytes() -> int:
    """Of this machine, or of this container where it has less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _CGROUPS:
        with suppress(OSError, ValueError):  # no limit is the word "max"
            whole = min(whole, int(Path(file).read_text()))
    return whole


def matmul_rate(seconds: float = 0.2) -> float:
    """Float32 operations a second of this machine as it is now, from products of 768 x 768."""
    import numpy as np

    a = np.ones((768, 768), np.float32)
    best, ends = 0.0, time.monotonic() + seconds
    while time.monotonic() < ends or not best:
        began = time.perf_counter()
        a @ a
        best = max(best, 2 * 768**3 / (time.perf_counter() - began))
    return best


def _vocabulary(base: BaseModelInfo) -> int:
    config = json.loads((base.path / "config.json").read_bytes())
    return int((config.get("text_config") or config).get("vocab_size", 0))


def _gpu_share(settings: EdgeSettings) -> float:
    given = vllm_arguments.value(settings.serving.extra_args, "--gpu-memory-utilization")
    try:
        return float(given or GPU_SHARE)
    except ValueError:  # vLLM says so
        return GPU_SHARE


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} million" if count >= 10**6 else f"{count:,}"


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
