"""A directory of anchors: what is read from it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from edge_node.errors import SettingsError
from edge_node.learning.anchors import (
    AnchorIndex,
    Sample,
    anchors_digest,
    read_anchors,
    read_states,
    summary,
)
from protos.manifest import canonical_json, sha256_hex

BASE = "a" * 64
SAMPLES = [
    Sample(kind="plain", ids=[1, 5, 6], prompt=1),
    Sample(kind="qa", ids=[4, 7, 5, 9], prompt=3),
]


def write(path: Path, states: torch.Tensor | None = None, **changes: Any) -> Path:
    path.mkdir()
    hidden = save({"hidden": torch.ones(7, 4, dtype=torch.bfloat16) if states is None else states})
    (path / "hidden.safetensors").write_bytes(hidden)
    index = AnchorIndex(
        base=BASE, seed=3, dtype="float32", samples=SAMPLES, hidden_sha256=sha256_hex(hidden)
    )
    (path / "anchors.json").write_bytes(canonical_json(index.model_dump(mode="json") | changes))
    return path


def test_samples_and_their_states_are_read(tmp_path: Path) -> None:
    rows = torch.arange(28, dtype=torch.bfloat16).reshape(7, 4)
    path = write(tmp_path / "a", rows)
    anchors = read_anchors(path, BASE)
    assert anchors.samples == SAMPLES
    assert (
        anchors.digest == anchors_digest(path) == sha256_hex((path / "anchors.json").read_bytes())
    )
    first, second = read_states(anchors)
    assert torch.equal(torch.cat([first, second]), rows)
    assert (len(first), len(second)) == (3, 4)
    assert summary(anchors.samples) == "1 plain, 0 open, 1 qa"


def no_index(path: Path) -> None:
    (path / "anchors.json").unlink()


def no_states(path: Path) -> None:
    (path / "hidden.safetensors").unlink()


def cut_states(path: Path) -> None:
    data = (path / "hidden.safetensors").read_bytes()
    (path / "hidden.safetensors").write_bytes(data[:-1])


def other_states(path: Path) -> None:
    changed = save({"hidden": torch.zeros(7, 4, dtype=torch.bfloat16)})
    (path / "hidden.safetensors").write_bytes(changed)


def no_json(path: Path) -> None:
    (path / "anchors.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_index, "there are no anchors in .*: No such file.*Make them with `edge-node anchors"),
        (no_states, r"hidden.safetensors cannot be read.*make it again"),
        (cut_states, r"hidden.safetensors cannot be read.*make it again"),
        (other_states, r"hidden.safetensors has SHA-256 \w{12}, anchors.json says \w{12}"),
        (no_json, r"damaged: anchors.json cannot be read: AnchorIndex is malformed"),
    ],
)
def test_a_damaged_directory_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    path = write(tmp_path / "a")
    spoil(path)
    with pytest.raises(SettingsError, match=rf"^EDGE_LEARNING__ANCHORS: .*{words}"):
        read_anchors(path, BASE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "malformed at format"),
        ({"samples": []}, "malformed at samples"),
        ({"samples": [{"kind": "qa", "ids": [1, 2], "prompt": 2}]}, "2 of 2 tokens are prompt"),
        ({"samples": [{"kind": "odd", "ids": [1, 2], "prompt": 1}]}, "samples.0.kind"),
        ({"hidden_sha256": "x"}, "hidden_sha256"),
    ],
)
def test_an_index_with_other_fields_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=rf"damaged: anchors.json cannot be read: .*{words}"):
        read_anchors(write(tmp_path / "a", **changes), BASE)


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (torch.ones(6, 4, dtype=torch.bfloat16), r"hidden, BF16 \[6, 4\]"),
        (torch.ones(7, 4), r"hidden, F32 \[7, 4\]"),
        (torch.ones(7, dtype=torch.bfloat16), r"hidden, BF16 \[7\]"),
    ],
)
def test_states_of_another_shape_are_refused(
    tmp_path: Path, states: torch.Tensor, said: str
) -> None:
    with pytest.raises(SettingsError, match=rf"holds {said}; expected hidden, BF16 \[7, hidden\]"):
        read_anchors(write(tmp_path / "a", states), BASE)


def test_anchors_of_another_base_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    with pytest.raises(SettingsError, match=r"made by base aaaaaaaaaaaa; this node's base is bbbb"):
        read_anchors(path, "b" * 64)
    assert json.loads((path / "anchors.json").read_bytes())["base"] == BASE
