"""Bases that cannot be served with LoRA, trained and merged are refused, with the reason."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from protos.base import BaseModelError, read_base_model, read_layout
from protos.checkpoint import unreadable
from tests.fakes.base_models import LLAMA, layers, make, shard


def refused(path: Path) -> str:
    with pytest.raises(BaseModelError) as raised:
        read_base_model(path)
    return str(raised.value)


def test_a_whole_model_of_a_known_family_needs_no_further_check(tmp_path: Path) -> None:
    single = read_base_model(make(tmp_path / "single"))
    assert single.is_known
    assert not single.is_wrapped
    sharded = read_base_model(shard(make(tmp_path / "sharded")))
    assert sharded.module_shapes == single.module_shapes
    assert set(single.module_shapes) == {
        f"model.layers.{n}.{module}" for n in range(2) for module in LLAMA
    }


def test_another_architecture_is_asked_about(tmp_path: Path) -> None:
    assert not read_base_model(make(tmp_path / "base", architectures=["NovelForCausalLM"])).is_known
    odd = layers() | {"model.layers.0.mlp.extra.weight": np.zeros((4, 4))}
    assert not read_base_model(make(tmp_path / "odd", odd)).is_known


# Experts.
@pytest.mark.parametrize(
    "name",
    ["model.layers.0.mlp.experts.0.up_proj.weight",
     "model.layers.0.block_sparse_moe.experts.0.w1.weight",
     "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.shared_expert.up_proj.weight"],
)  # fmt: skip
def test_a_mixture_of_experts_is_refused_by_its_tensors(tmp_path: Path, name: str) -> None:
    text = refused(make(tmp_path / "base", layers() | {name: np.zeros((4, 4), np.float32)}))
    assert "mixture of experts" in text
    assert name in text
    assert "dense" in text


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_a_mixture_of_experts_is_refused_by_its_config(tmp_path: Path, key: str) -> None:
    assert f"{key} is 8" in refused(make(tmp_path / "base", **{key: 8}))
    assert read_layout(make(tmp_path / "dense", **{key: 0})).is_known


# Quantised.
@pytest.mark.parametrize(
    ("config", "said"),
    [({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
     ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
      "bitsandbytes"),
     ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
     ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors")],
)  # fmt: skip
def test_a_quantised_checkpoint_is_refused_by_its_config(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    text = refused(make(tmp_path / "base", **config))
    assert f"stored quantised ({said})" in text
    assert "--quantization" in text


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("model.layers.0.mlp.up_proj.qweight", np.int32),
     ("model.layers.0.mlp.up_proj.weight.absmax", np.uint8),
     ("model.layers.0.mlp.up_proj.weight_packed", np.int32),
     ("model.layers.0.mlp.down_proj_blocks", np.uint8),
     ("model.layers.0.mlp.up_proj.weight_scale_inv", np.float32),
     ("model.layers.0.mlp.up_proj.weight", np.uint8)],
)  # fmt: skip
def test_a_quantised_checkpoint_is_refused_by_its_tensors(
    tmp_path: Path, name: str, dtype: Any
) -> None:
    assert f"tensor {name}" in refused(
        make(tmp_path / "base", layers() | {name: np.zeros((4, 2), dtype)})
    )


def test_an_empty_quantisation_is_none(tmp_path: Path) -> None:
    assert read_layout(
        make(tmp_path / "base", layers(dtype=np.float16), quantization_config=None)
    ).is_known


# Kinds.
@pytest.mark.parametrize(
    ("config", "said"),
    [({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM does not generate text"),
     ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
     ({"architectures": "LlamaForCausalLM"}, "expected a list"),
     ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
      "an encoder and a decoder"),
     ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "transposed"),
     ({"architectures": ["BloomForCausalLM"]}, "vLLM serves BloomForCausalLM without LoRA"),
     ({"transformers_weights": "other.safetensors"}, "other.safetensors")],
)  # fmt: skip
def test_a_model_of_the_wrong_kind_is_refused(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    assert said in refused(make(tmp_path / "base", **config))


def test_a_model_without_numbered_layers_is_refused(tmp_path: Path) -> None:
    text = refused(
        make(
            tmp_path / "base", {"wte.weight": np.zeros((4, 4))}, architectures=["NovelForCausalLM"]
        )
    )
    assert "of its 1 tensors" in text


def test_parts_that_are_not_trained_are_no_modules(tmp_path: Path) -> None:
    extra = {name: np.zeros((4, 4), np.float32) for name in
             ("lm_head.weight", "transformer.wte.weight", "mtp.layers.0.mlp.up_proj.weight",
              "model.layers.0.embed.weight")}  # fmt: skip
    assert read_layout(make(tmp_path / "base", layers() | extra)).is_known


# Wrappers.
@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_text_model_inside_a_known_wrapper_is_found(tmp_path: Path, prefix: str) -> None:
    tower = {"vision_tower.layers.0.fc1.weight": np.zeros((4, 4), np.float32)}
    wrapped = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
               "text_config": {"model_type": "gemma3_text"}, "vision_config": {}}  # fmt: skip
    layout = read_layout(make(tmp_path / "base", layers(prefix=prefix) | tower, **wrapped))
    assert set(layout.module_shapes) == {
        f"{prefix}layers.{n}.{module}" for n in range(2) for module in LLAMA
    }
    module = f"{prefix}layers.0.mlp.up_proj"
    assert layout.text_name(module) == "model.layers.0.mlp.up_proj"
    assert layout.base_name(layout.text_name(module)) == module
    assert read_base_model(tmp_path / "base").is_wrapped


@pytest.mark.parametrize("kind", ["qwen3_5", "llama4", "idefics3"])
def test_another_wrapper_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    tensors = layers(prefix="model.language_model.")
    text = refused(
        make(tmp_path / "base", tensors, model_type=kind, text_config={"model_type": "x"})
    )
    assert f"text model 'x' inside {kind!r}" in text
    assert "gemma3, llava, mistral3" in text


@pytest.mark.parametrize("inside", [{}, {"model_type": []}, {"model_type": None}])
def test_a_wrapper_that_names_no_text_model_is_refused(
    tmp_path: Path, inside: dict[str, Any]
) -> None:
    tensors = layers(prefix="language_model.model.")
    assert "inside 'gemma3'" in refused(
        make(tmp_path / "base", tensors, model_type="gemma3", text_config=inside)
    )


def test_another_text_model_inside_a_wrapper_is_refused_by_name(tmp_path: Path) -> None:
    tensors = layers(prefix="language_model.model.")
    text = refused(
        make(tmp_path / "base", tensors, model_type="llava", text_config={"model_type": "phi"})
    )
    assert "text model 'phi' inside 'llava'" in text


# Files.
def spoil(name: str) -> tuple[Callable[[Path], Any], str]:
    """What is done to a sharded model, and what the message says."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = "model.safetensors.index.json"

    def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
        def write(path: Path) -> None:
            document = json.loads((path / index).read_text())
            change(document)
            (path / index).write_text(json.dumps(document))

        return write

    def cut(size: int) -> Callable[[Path], Any]:
        return lambda path: (path / second).write_bytes((path / second).read_bytes()[:size])

    return {
        "a shard is missing": (lambda path: (path / second).unlink(),
                               f"names {second}, which is not in"),
        "a shard is a broken link": (
            lambda path: ((path / second).unlink(), (path / second).symlink_to("nowhere")),
            "which is not in"),
        "a shard is cut": (cut(-1), "is cut off: it has"),
        "a shard is cut in its header": (cut(100), "is cut off: it has 100 bytes"),
        "a shard is empty": (cut(0), "is not a safetensors file: it has 0 bytes"),
        "a shard has more bytes": (
            lambda path: (path / second).write_bytes((path / second).read_bytes() + b"x"),
            "1 bytes follow"),
        "a shard is a pointer": (
            lambda path: (path / second).write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "git-lfs pointer"),
        "a tensor is not in its shard": (
            rewrite(lambda document: document["weight_map"].update(
                {"model.layers.0.extra.weight": first})),
            f"'model.layers.0.extra.weight' is in {first}; it is in none"),
        "the shards changed places": (
            lambda path: ((path / first).rename(path / "x"), (path / second).rename(path / first),
                          (path / "x").rename(path / second)), "of different versions"),
        "the index leads out": (
            rewrite(lambda document: document["weight_map"].update(
                {"x.weight": "../other.safetensors"})),
            "'../other.safetensors'"),
        "the index is no JSON": (lambda path: (path / index).write_text("{"), "is not JSON"),
        "the index is a pointer": (
            lambda path: (path / index).write_text("version https://git-lfs.github.com/spec/v1"),
            "git-lfs pointer"),
        "the index is empty": (rewrite(lambda document: document.update(weight_map={})),
                               "no table weight_map"),
        "the index is gone": (lambda path: (path / index).unlink(), f"Download {index}"),
        "there is a single file too": (
            lambda path: save_file(layers(), path / "model.safetensors"), "Move one of both out"),
        "the tokenizer is cut": (lambda path: (path / "tokenizer.json").write_text('{"model": '),
                                 "not a whole JSON"),
        "the config is a list": (lambda path: (path / "config.json").write_text("[]"),
                                 "expected a JSON object"),
    }[name]  # fmt: skip


@pytest.mark.parametrize("damage", [
    "a shard is missing", "a shard is a broken link", "a shard is cut",
    "a shard is cut in its header", "a shard is empty",
    "a shard has more bytes", "a shard is a pointer", "a tensor is not in its shard",
    "the shards changed places",
    "the index leads out", "the index is no JSON", "the index is a pointer", "the index is empty",
    "the index is gone",
    "there is a single file too", "the tokenizer is cut", "the config is a list",
])  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = shard(make(tmp_path / "base"))
    spoil_it, said = spoil(damage)
    spoil_it(path)
    assert said in refused(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    path = shard(make(tmp_path / "base"))
    save_file(layers(), path / "model-00001-of-00002.safetensors")
    assert "expected it once" in refused(path)


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    tensors = layers()
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    assert "layer 1 of 2 has no mlp.gate_proj, which LlamaForCausalLM needs" in refused(
        make(tmp_path / "a", tensors)
    )
    assert "layer 2 of 3" in refused(make(tmp_path / "b", num_hidden_layers=3))
    assert "layer 2 of 1000000000000 has no" in refused(
        make(tmp_path / "c", num_hidden_layers=10**12)
    )


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),  # overlap
     ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),  # hole
     ({"a": entry([3], 0, 8)}, bytes(8)),  # shape and length
     ({"a": entry([2], 8, 0)}, bytes(8)),
     ({"a": entry([-2], 0, 8)}, bytes(8)),
     ({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
     ({"a": entry([2**62] * 40, 0, 8, "NEW"), "b": entry([2], 4, 12)}, bytes(12)),
     ({"a": entry([2], 0, -8, "NEW")}, bytes(8)),
     ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, bytes(8)),
     ({"a": entry([True], 0, 4)}, bytes(4)),
     ({}, b"")],
)  # fmt: skip
def test_a_header_that_does_not_fit_its_data_is_refused(
    tmp_path: Path, header: Any, data: bytes
) -> None:
    path = make(tmp_path / "base")
    (path / "model.safetensors").write_bytes(with_header(header, data))
    assert "model.safetensors is not a safetensors file" in refused(path)


def test_an_unknown_type_of_any_size_is_no_crash(tmp_path: Path) -> None:
    path = make(tmp_path / "base")
    header = {"model.layers.0.x.weight": entry([2**62] * 40, 0, 8, "NEW")}
    (path / "model.safetensors").write_bytes(with_header(header, bytes(8)))
    assert "does not work here" in refused(path)


def test_weights_that_only_their_owner_can_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "base")
    weights = path / "model.safetensors"
    weights.chmod(0o600)

    def denied(path: Path) -> None:  # the tests may run as root, whom nothing is denied
        raise PermissionError(errno.EACCES, "Permission denied", str(weights))

    monkeypatch.setattr("protos.base.read_layout", denied)
    said = refused(path)
    assert f"{weights} cannot be read by user {os.geteuid()}" in said
    assert f"belongs to user {weights.stat().st_uid} and has mode 600" in said
    assert f"chmod -R a+rX {path}" in said
    monkeypatch.setattr(Path, "stat", denied)
    assert "a directory above it is closed. Run `chmod a+x` on each directory above it" in str(
        unreadable(path, PermissionError(errno.EACCES, "Permission denied", str(weights)))
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_directory_or_a_broken_link_in_the_place_of_a_file_is_named(
    tmp_path: Path, name: str
) -> None:
    path = make(tmp_path / "base")
    (path / name).unlink(missing_ok=True)
    (path / name).mkdir()
    assert f"{path / name} cannot be read: Is a directory" in refused(path)
    if name == "model.safetensors":
        (path / name).rmdir()
        (path / name).symlink_to("gone")
        assert f"{path / name} cannot be read: No such file" in refused(path)


def test_files_beside_the_shards_do_not_count(tmp_path: Path) -> None:
    plain = read_base_model(shard(make(tmp_path / "plain")))
    path = shard(make(tmp_path / "base"))
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"layers.0.attention.wq.weight": np.zeros((4, 4), np.float32)}, path / name)
    (path / "pytorch_model.bin").write_bytes(b"x")
    (path / "nested").mkdir()
    save_file(layers(), path / "nested" / "model.safetensors")
    read = read_base_model(path)
    assert (read.digest, read.module_shapes) == (plain.digest, plain.module_shapes)


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"],
)
def test_a_second_file_without_an_index_is_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "base")
    save_file({"x.weight": np.zeros((4, 4), np.float32)}, path / name)
    assert f"holds {name} beside model.safetensors" in refused(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", "pytorch_model.bin is there instead"),
     ("model.gguf", "model.gguf is there instead"),
     ("consolidated.safetensors", "Mistral's own format"),
     ("weights.safetensors", "neither model.safetensors nor")],
)  # fmt: skip
def test_weights_in_another_form_are_named(tmp_path: Path, name: str, said: str) -> None:
    path = make(tmp_path / "base")
    (path / "model.safetensors").rename(path / name)
    assert said in refused(path)


def test_a_directory_of_links_is_read(tmp_path: Path) -> None:
    path, links = shard(make(tmp_path / "blobs")), tmp_path / "snapshot"
    links.mkdir()
    for file in path.iterdir():
        (links / file.name).symlink_to(Path("..", "blobs", file.name))
    assert read_base_model(links).digest == read_base_model(path).digest
