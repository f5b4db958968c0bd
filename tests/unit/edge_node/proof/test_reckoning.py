"""PEFT's log-probabilities are those of the base with the release merged in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_node.learning.training import load_start
from edge_node.proof.reckoning import ALWAYS, CANARIES, Reckoning
from edge_node.releases.peft_directory import peft_files
from protos.base import read_base_model
from protos.lora import LoraModule, LoraTensors
from tests.fakes.tiny_model import SPECIALS, tiny_adapter, tiny_model

TOKENS = 24


def write(folder: Path, tensors: LoraTensors) -> Path:
    folder.mkdir()
    for name, content in peft_files(tensors, read_base_model(tiny_model()).module_shapes).items():
        (folder / name).write_bytes(content)
    return folder


def order(release: Path, before: Path | None = None, seed: int = 5) -> dict[str, Any]:
    return {
        "base": str(tiny_model()), "release": str(release), "tokens": TOKENS, "seed": seed,
        "before": None if before is None else str(before), "parameters": 200_000,
    }  # fmt: skip


def merged(release: Path | None, prompts: Sequence[Any]) -> Any:
    """The same by another way: the product of the factors added to the weights."""
    model = load_start(tiny_model(), release).eval()
    with torch.no_grad():
        values = torch.log_softmax(model(input_ids=torch.tensor(prompts)).logits, dim=-1)
    return values[:, :-1].gather(2, torch.tensor(prompts)[:, 1:, None])[:, :, 0].numpy()


def test_release_and_base_are_what_merging_gives(tmp_path: Path) -> None:
    release = write(tmp_path / "one", tiny_adapter(1, rank=4, strength=0.5))
    before = write(tmp_path / "two", tiny_adapter(2, rank=8, strength=0.5))
    reckoning = Reckoning()
    for turn in (before, None):  # the second order meets a base that the first one has left clean
        answer = reckoning.answer(order(release, turn))
        prompts = answer["prompts"]
        assert not [name for name, _ in reckoning._base.named_modules() if "lora" in name]
        assert np.shape(prompts) == (CANARIES, TOKENS)
        assert np.min(prompts) >= SPECIALS.index("<user>"), "the tokenizer's own special tokens"
        assert answer["release"] == pytest.approx(merged(release, prompts), abs=1e-4)
        assert answer["base"] == pytest.approx(merged(None, prompts), abs=1e-4)
    again = Reckoning().answer(order(release))
    assert again == answer, "the same on every node"
    assert reckoning.answer(order(release, seed=6))["prompts"] != prompts


def test_canaries_tell_the_release_from_the_one_before(tmp_path: Path) -> None:
    """Releases that differ in one module: the chosen prompts tell them better than the first."""
    tensors = tiny_adapter(1, strength=0.5)
    name = "model.layers.0.mlp.down_proj"
    near = LoraTensors(
        {**tensors.modules, name: LoraModule(tensors.modules[name].A, -tensors.modules[name].B)}
    )
    release, before = write(tmp_path / "one", tensors), write(tmp_path / "two", near)
    answer = Reckoning().answer(order(release, before))
    apart = np.abs(np.array(answer["release"]) - merged(before, answer["prompts"])).mean(axis=1)
    assert apart[ALWAYS:].min() > 0
    assert list(apart[ALWAYS:]) == sorted(apart[ALWAYS:], reverse=True)
    others = Reckoning().answer(order(before, release))
    assert others["prompts"][:ALWAYS] == answer["prompts"][:ALWAYS], "the cache may have these"


def test_a_release_of_zeros_is_the_base(tmp_path: Path) -> None:
    answer = Reckoning().answer(order(write(tmp_path / "zero", LoraTensors({}))))
    assert answer["release"] == answer["base"]


def test_factors_without_a_place_are_an_error(tmp_path: Path) -> None:
    release = write(tmp_path / "one", tiny_adapter(1))
    file = release / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"layers.1.mlp.up_proj", b"layers.7.mlp.up_proj"))
    with pytest.raises(ValueError, match=r"layers\.7|place"):
        Reckoning().answer(order(release))
