"""An unknown family of base is asked about once; the answer chooses version 0's modules too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_node import base_model
from edge_node.base_model import check_base, read_base
from edge_node.errors import SettingsError
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import BaseModelSettings, EdgeSettings
from protos.lora import LoraTensors
from tests.fakes.base_models import make

DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Bases that were asked about; all but one module is known."""
    found: list[str] = []

    def run(command: list[str], **options: Any) -> Any:
        found.append(command[-1])
        assert not [name for name in options["env"] if name.startswith("EDGE_")]
        return subprocess.CompletedProcess(command, 0, json.dumps({"modules": [UP]}), "")

    monkeypatch.setattr(base_model.subprocess, "run", run)
    return found


def settings_of(tmp_path: Path, **config: Any) -> EdgeSettings:
    base = make(tmp_path / "base", **config)
    (tmp_path / "data").mkdir()
    return EdgeSettings(data_dir=tmp_path / "data", base=BaseModelSettings(path=base))


def test_a_known_family_is_not_asked_about(tmp_path: Path, asked: list[str]) -> None:
    assert len(check_base(settings_of(tmp_path)).module_shapes) == 14
    assert asked == []


def test_an_unknown_family_is_asked_about_once(tmp_path: Path, asked: list[str]) -> None:
    settings = settings_of(tmp_path, architectures=["NovelForCausalLM"])
    assert len(read_base(settings).module_shapes) == 14
    assert list(check_base(settings).module_shapes) == [UP]
    assert list(check_base(settings).module_shapes) == [UP]
    assert list(read_base(settings).module_shapes) == [UP]
    assert len(asked) == 1
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"note": "another base"}))
    check_base(settings)
    assert len(asked) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"modules": 3}', '{"modules": ["other"]}'])
def test_a_damaged_answer_is_asked_for_again(
    tmp_path: Path, asked: list[str], content: str
) -> None:
    settings = settings_of(tmp_path, architectures=["NovelForCausalLM"])
    check_base(settings)
    (settings.data_dir / base_model.ANSWER_FILE).write_text(content)
    assert list(check_base(settings).module_shapes) == [UP]
    assert len(asked) == 2


def test_version_0_has_a_module_that_everybody_knows(tmp_path: Path, asked: list[str]) -> None:
    base = check_base(settings_of(tmp_path, architectures=["NovelForCausalLM"]))
    config = json.loads(peft_files(LoraTensors(), base.module_shapes)["adapter_config.json"])
    assert config["target_modules"] == ["up_proj"]  # the first of the checkpoint is down_proj
    assert min(read_base(settings_of_other(tmp_path)).module_shapes) == DOWN


def test_a_check_makes_no_data_directory(tmp_path: Path, asked: list[str]) -> None:
    settings_of(tmp_path, architectures=["NovelForCausalLM"])
    check_base(settings_of_other(tmp_path))
    assert not (tmp_path / "other").exists()


def settings_of_other(tmp_path: Path) -> EdgeSettings:
    return EdgeSettings(data_dir=tmp_path / "other", base=BaseModelSettings(path=tmp_path / "base"))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            '{"problem": "vLLM serves NovelForCausalLM without LoRA"}',
            "vLLM serves NovelForCausalLM without LoRA",
        ),
        ('{"modules": []}', "does not work here"),
        ("", "Segmentation fault"),
        ("[]", "failed"),
    ],
)
def test_the_reason_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, said: str
) -> None:
    def run(command: list[str], **_: Any) -> Any:
        return subprocess.CompletedProcess(command, 0, answer, "noise\nSegmentation fault")

    monkeypatch.setattr(base_model.subprocess, "run", run)
    settings = settings_of(tmp_path, architectures=["NovelForCausalLM"])
    with pytest.raises(SettingsError, match=said) as raised:
        check_base(settings)
    assert "EDGE_BASE__PATH" in str(raised.value)
    assert not (settings.data_dir / base_model.ANSWER_FILE).exists()
    with pytest.raises(
        SettingsError, match=said
    ):  # asked again, as the operator may have mended it
        check_base(settings)


def test_what_central_refuses_a_node_refuses_in_the_same_words(
    tmp_path: Path, asked: list[str]
) -> None:
    settings = settings_of(tmp_path, num_experts=8)
    for read in (read_base, check_base):
        with pytest.raises(
            SettingsError,
            match=r"EDGE_BASE__PATH: Base model .* a mixture of experts \(num_experts is 8\)",
        ):
            read(settings)
    assert asked == []
