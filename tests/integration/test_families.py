"""Families of base models, each as a tiny random model: served, trained, merged - or refused.

The release merged into float32 weights (transformers) gives the log-probabilities of the release as
an adapter (vLLM).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_node.base_model import check_base
from edge_node.errors import SettingsError
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import BaseModelSettings, EdgeSettings
from protos.base import BaseModelError, BaseModelInfo, read_layout
from protos.families import FAMILIES
from protos.lora import LoraModule, LoraTensors
from tests.fakes.families import (
    NEWLY_CHECKED,
    REFUSED,
    REFUSED_BY_VLLM,
    WORKS,
    WRAPPED,
    build_family,
    shard_beside_mistrals_own_format,
)
from tests.integration.family_probe import PROMPT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
ALL = [*WORKS, *NEWLY_CHECKED, *WRAPPED]


@dataclass(frozen=True)
class Family:
    base: BaseModelInfo
    release: Path
    answer: dict[str, Any]


def check(folder: Path) -> BaseModelInfo:
    return check_base(
        EdgeSettings(data_dir=folder / "data", base=BaseModelSettings(path=folder / "base"))
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Every family, checked as a node checks it, and what vLLM answers with its release."""
    root = tmp_path_factory.mktemp("families")
    bases = {}
    for family in ALL:
        build_family(family, root / family / "base")
        if family == "mistral":
            shard_beside_mistrals_own_format(root / family / "base")
        bases[family] = check(root / family)
        (root / family / "release").mkdir()
        shapes = bases[family].module_shapes
        for name, data in peft_files(make_release(shapes), shapes).items():
            (root / family / "release" / name).write_bytes(data)
    command = [
        sys.executable,
        "-m",
        "tests.integration.family_probe",
        *(str(root / family) for family in ALL),
    ]
    quiet = {
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    quiet |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | quiet, capture_output=True, text=True, timeout=800
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(ALL), done.stderr[-2000:]
    found = zip(ALL, answers, strict=True)
    return {
        family: Family(bases[family], root / family / "release", answer) for family, answer in found
    }


def make_release(shapes: Any) -> LoraTensors:
    generator = np.random.default_rng(1)

    def factor(*shape: int) -> Any:
        return generator.normal(0, 0.3 / np.sqrt(shape[-1]), shape).astype(np.float32)

    return LoraTensors(
        {name: LoraModule(factor(4, i), factor(o, 4)) for name, (o, i) in sorted(shapes.items())}
    )


def log_probs(base: Path, release: Path | None, ids: list[int]) -> Any:
    import torch

    from edge_node.learning.training import load_start

    model = load_start(base, release).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPT + ids]), use_cache=False).logits[
            0, len(PROMPT) - 1 : -1
        ]
    return (
        torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    )


@pytest.mark.parametrize("family", ALL)
def test_a_release_served_is_the_release_merged(families: dict[str, Family], family: str) -> None:
    found = families[family]
    assert "error" not in found.answer, found.answer
    ids, served = found.answer["ids"], np.array(found.answer["log_probs"])
    merged = log_probs(found.base.path, found.release, ids)
    assert np.abs(merged - served).max() < 2e-5
    assert (
        np.abs(merged - log_probs(found.base.path, None, ids)).max() > 0.005
    )  # the release does something


@pytest.mark.parametrize("family", ALL)
def test_an_update_has_the_modules_of_the_base(families: dict[str, Family], family: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from edge_node.learning.training import load_start, read_factors

    base = families[family].base
    layout = read_layout(base.path)
    targets = [layout.text_name(name) for name in base.module_shapes]
    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load_start(base.path, families[family].release), config)
    ids = torch.tensor([PROMPT])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    update = read_factors(model, 4, layout).modules
    moved = {
        name: (part.B.shape[0], part.A.shape[1]) for name, part in update.items() if part.B.any()
    }
    assert moved == dict(base.module_shapes)


def test_every_family_that_needs_no_check_is_in_this_test(families: dict[str, Family]) -> None:
    known = {
        json.loads((found.base.path / "config.json").read_text())["architectures"][0]
        for found in families.values()
        if found.base.is_known
    }
    assert known == set(FAMILIES)
    assert {family for family, found in families.items() if found.base.is_known} == set(WORKS)


@pytest.mark.parametrize("family", REFUSED)
def test_a_base_that_cannot_work_is_refused_by_central_too(tmp_path: Path, family: str) -> None:
    with pytest.raises(BaseModelError, match=REFUSED[family]["says"]):
        read_layout(build_family(family, tmp_path / "base"))


@pytest.mark.parametrize("family", REFUSED_BY_VLLM)
def test_a_base_that_vllm_cannot_build_is_refused_before_enrolment(
    tmp_path: Path, family: str
) -> None:
    build_family(family, tmp_path / "base")
    with pytest.raises(
        SettingsError, match=f"does not work here: .*{REFUSED_BY_VLLM[family]['says']}"
    ):
        check(tmp_path)
