from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from edge_node import sizing
from edge_node.base_model import read_base
from edge_node.errors import SettingsError
from edge_node.learning.compute import count_parameters
from edge_node.settings import EdgeSettings
from protos.base import BaseModelInfo, read_base_model
from tests.fakes.tiny_model import tiny_model, write_tokenizer

BILLION = 10**9


def make_settings(base: Path | None = None, **groups: Any) -> EdgeSettings:
    return EdgeSettings.model_validate({"base": {"path": base or tiny_model()}, **groups})


def estimate(**learning: Any) -> sizing.Estimate:
    settings = make_settings(learning=learning, serving={"max_model_len": 128})
    return sizing.estimate(settings, read_base(settings), "float32")


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model())
    assert count_parameters(tiny_model()) == model.num_parameters()
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    )
    names = ("language_model.model.layers.0.mlp.up_proj", "language_model.lm_head", "vision.0.fc")
    save_file(
        {f"{name}.weight": np.zeros((2, 3), np.float32) for name in names},
        tmp_path / "model.safetensors",
    )
    assert count_parameters(tmp_path) == 12, "without the part for images"


def test_fewer_modules_tokens_or_activations_need_less() -> None:
    whole = estimate()
    assert whole.parameters == count_parameters(tiny_model())
    assert whole.tokens == 12 * 128, "no environment is an anchor here"
    shapes = read_base_model(tiny_model()).module_shapes
    assert whole.trained == 8 * sum(out + into for out, into in shapes.values())
    attention, parts = estimate(target_modules="attention"), estimate(batch_tokens=256)
    checkpoints = estimate(gradient_checkpointing=True)
    for smaller in (attention, parts, checkpoints):
        assert smaller.memory_bytes < whole.memory_bytes
    assert attention.trained < whole.trained
    assert parts.flops == whole.flops < checkpoints.flops
    assert parts.tokens == whole.tokens


SMOLLM2 = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "parameters", "learning", "measured_mb"),
    [
        (30, 134_515_008, {"dtype": "float32", "batch_tokens": 630}, 3226),
        (30, 134_515_008, {"dtype": "bfloat16", "batch_tokens": 630}, 2709),
        (4, 42_472_000, {"dtype": "bfloat16", "batch_tokens": 768}, 1725),
        (4, 42_472_000, {"dtype": "bfloat16"}, 4137),
        (4, 42_472_000, {"dtype": "bfloat16", "gradient_checkpointing": True}, 4000),
    ],
)
def test_the_memory_is_near_what_was_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layers: int,
    parameters: int,
    learning: dict[str, Any],
    measured_mb: int,
) -> None:
    """SmolLM2-135M, whole and of 4 layers: peaks of the learner in `benchmarks.training`."""
    (tmp_path / "config.json").write_text('{"vocab_size": 49152}')
    shapes = {f"model.layers.{n}.{m}": size for n in range(layers) for m, size in SMOLLM2.items()}
    monkeypatch.setattr(sizing, "count_parameters", lambda path: parameters)
    settings = make_settings(learning=learning)
    base = BaseModelInfo(tmp_path, "ab" * 32, shapes)
    found = sizing.estimate(settings, base, settings.learning.dtype).memory_bytes / 2**20
    assert found == pytest.approx(measured_mb, rel=0.1)


def test_doctor_is_told_what_a_round_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(learning={"device": "cpu", "target_modules": "attention"})
    text = sizing.describe(settings, read_base(settings))
    parameters = count_parameters(tiny_model())
    assert f"{parameters:,} parameters in float32 on cpu, 8 modules with 7,168 trained" in text
    assert "estimated for steps of 3072 tokens" in text
    assert "fit" not in text
    monkeypatch.setattr(sizing, "memory_bytes", lambda: 2 * BILLION)
    text = sizing.describe(settings, read_base(settings))
    assert "That does not fit beside vLLM, which leaves 0.7 GB of 2.0 GB: set EDGE_LEARN" in text


@pytest.mark.parametrize(("share", "fits"), [([], False), (["--gpu-memory-utilization=0.5"], True)])
def test_on_a_gpu_vllm_leaves_what_its_share_leaves(
    monkeypatch: pytest.MonkeyPatch, share: list[str], fits: bool
) -> None:
    monkeypatch.setattr(sizing, "cuda_bytes", lambda: 8 * BILLION)
    settings = make_settings(serving={"extra_args": share})
    text = sizing.describe(settings, read_base(settings))
    assert "on cuda" in text
    assert "nothing was measured on a GPU" in text
    assert ("does not fit beside vLLM, which leaves 0.6 GB of 8.0 GB" in text) is not fits


@pytest.mark.parametrize(
    ("learning", "words"),
    [
        ({"device": "cuda"}, "EDGE_LEARNING__DEVICE is 'cuda', and torch sees no CUDA device"),
        ({"target_modules": ["w_proj"]}, "names 'w_proj', which the base model does not have"),
    ],
)
def test_a_round_that_could_not_start_is_told_before(learning: dict[str, Any], words: str) -> None:
    settings = make_settings(learning=learning)
    base = read_base(settings)
    for check in (sizing.expect_trainable, sizing.describe):
        with pytest.raises(SettingsError, match=words):
            check(settings, base)


def test_a_container_has_no_more_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(sizing, "_CGROUPS", (str(tmp_path / "absent"), str(limit)))
    limit.write_text("max\n")
    machine = sizing.memory_bytes()
    assert machine > BILLION // 4
    limit.write_text("1000000\n")
    assert sizing.memory_bytes() == 1_000_000


def test_vllm_holds_process_weights_and_cache(tmp_path: Path) -> None:
    settings = make_settings(serving={"max_model_len": 128})
    base = BaseModelInfo(tiny_model(), "ab" * 32, {})
    parameters = count_parameters(tiny_model())
    assert sizing.vllm_bytes(settings, base) == sizing.VLLM_BYTES + 2 * parameters + (64 << 20)


def test_a_machine_multiplies_at_some_rate() -> None:
    assert sizing.matmul_rate(0.0) > 1e6
