"""Identity of a base model: the digest changes with every byte that matters, and only then."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from protos.base import BaseModelError, read_base_model

WEIGHTS = {
    "model.embed_tokens.weight": (16, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.0.mlp.up_proj.bias": (8,),
    "model.norm.weight": (4,),
    "lm_head.weight": (16, 4),
}


def make_model(path: Path, fill: float = 0.0) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    save_file(
        {name: np.full(shape, fill, np.float32) for name, shape in WEIGHTS.items()},
        path / "model.safetensors",
    )
    return path


def test_shapes_of_the_linear_modules(tmp_path: Path) -> None:
    info = read_base_model(make_model(tmp_path / "base"))
    assert info.module_shapes == {
        "model.layers.0.self_attn.q_proj": (4, 4),
        "model.layers.0.mlp.up_proj": (8, 4),
    }
    assert info.path == tmp_path / "base"


def test_golden_digest(tmp_path: Path) -> None:
    assert (
        read_base_model(make_model(tmp_path / "base")).digest
        == "f41ec513b927b8419b556facaecbeefb6033030a8aa23b07782d5b33d5bcc4df"
    )


def test_a_copy_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    (second / "README.md").write_text("not part of the model")
    assert read_base_model(first).digest == read_base_model(second).digest


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "quantization_config.json"]
)
def test_every_identity_file_changes_the_digest(tmp_path: Path, name: str) -> None:
    path = make_model(tmp_path / "base")
    before = read_base_model(path).digest
    (path / name).write_text('{"x": 1}')
    assert read_base_model(path).digest != before


def test_one_weight_changes_the_digest(tmp_path: Path) -> None:
    digests = {
        read_base_model(make_model(tmp_path / str(fill), fill)).digest for fill in (0.0, 1e-30)
    }
    assert len(digests) == 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="does not exist"):
        read_base_model(tmp_path / "nowhere")
    with pytest.raises(
        BaseModelError, match=r"config.json, tokenizer.json, \*.safetensors not found"
    ):
        read_base_model(tmp_path)


def test_the_digest_is_the_same_from_the_memory(tmp_path: Path) -> None:
    path = make_model(tmp_path / "base")
    first = read_base_model(path)
    for file in path.iterdir():
        os.utime(file, ns=(1, 1))
    assert read_base_model(path, memory=tmp_path) == first
    assert read_base_model(path, memory=tmp_path) == first


def with_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        with_header(b"[]"),
        with_header(b"[" * 100_000),
        with_header(json.dumps({"a.weight": {"dtype": "F32"}}).encode()),
        with_header(json.dumps({"a.weight": {"shape": 3}}).encode()),
        with_header(json.dumps({"a.weight": None}).encode()),
    ],
)
def test_a_broken_weight_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = make_model(tmp_path / "base")
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(BaseModelError, match=r"model.safetensors is not a safetensors file"):
        read_base_model(path)
