"""A round's memory, type and modules: what changes its update, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from central.intake.checks import check_payload
from central.merging import merge
from edge_node.errors import SettingsError
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.round import release_directory, train_on_experience
from edge_node.learning.training import TrainedRound, load_start
from edge_node.learning.worker import Worker, main
from edge_node.learning.workplace import find_workplace
from edge_node.releases.peft_directory import peft_files
from edge_node.settings import EdgeSettings, LearningSettings
from protos.base import read_base_model
from protos.lora import LoraTensors, decode
from protos.manifest import UpdateManifest
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import tiny_adapter, tiny_model


def make_plan(settings: EdgeSettings, strength: float = 0.3) -> RoundPlan:
    release = activate(settings, tiny_adapter(5, strength=strength), version=1)
    meet(settings, release.label, 12)
    plan = Worker(settings, NODE_ID)._next_round()
    assert plan is not None
    return plan


def train(plan: RoundPlan, settings: EdgeSettings, folder: Path, **compute: Any) -> TrainedRound:
    learning = LearningSettings.model_validate(settings.learning.model_dump() | compute)
    settings = settings.model_copy(update={"learning": learning})
    release = release_directory(settings.data_dir, plan.release_id)
    return train_on_experience(plan, settings, find_workplace(plan, settings, release, folder))


def largest_difference(one: LoraTensors, other: LoraTensors) -> float:
    assert one.modules.keys() == other.modules.keys()
    return max(
        float(np.abs(getattr(one.modules[name], factor) - getattr(module, factor)).max())
        for name, module in other.modules.items()
        for factor in "AB"
    )


def test_a_step_in_parts_is_the_undivided_step(tmp_path: Path) -> None:
    """Anchors are shorter than own rows here, so that parts differ in their answer tokens."""
    settings = make_node(tmp_path / "node", steps=6, batch_own=5, batch_anchor=4)
    plan = make_plan(settings)
    whole = train(plan, settings, tmp_path / "whole")
    for budget in (1, 17, 40):
        parts = train(plan, settings, tmp_path / f"parts-{budget}", batch_tokens=budget)
        assert largest_difference(whole.tensors, parts.tensors) < 1e-5
        for name in ("loss_first", "loss_last"):
            assert parts.metrics[name] == pytest.approx(whole.metrics[name], abs=1e-4)


def test_activations_computed_again_are_the_same(tmp_path: Path) -> None:
    settings = make_node(tmp_path / "node", steps=4)
    plan = make_plan(settings)
    whole = train(plan, settings, tmp_path / "whole")
    again = train(plan, settings, tmp_path / "again", gradient_checkpointing=True)
    assert largest_difference(whole.tensors, again.tensors) < 1e-5


def test_bfloat16_is_the_arithmetic_alone(tmp_path: Path) -> None:
    settings = make_node(tmp_path / "node", steps=4, dtype="bfloat16")
    plan = make_plan(settings)
    rounded = train(plan, settings, tmp_path / "bfloat16")
    exact = train(plan.model_copy(update={"dtype": "float32"}), settings, tmp_path / "float32")
    assert 1e-6 < largest_difference(rounded.tensors, exact.tensors) < 0.1
    assert {parameter.dtype for parameter in rounded.model.parameters()} == {torch.float32}
    assert plan.dtype == "bfloat16"
    small = train(plan.model_copy(update={"dtype": "auto"}), settings, tmp_path / "auto")
    assert largest_difference(small.tensors, exact.tensors) == 0, "the base is a small one"


def test_a_small_increment_survives_the_merge_of_a_bfloat16_round(tmp_path: Path) -> None:
    """bfloat16 weights would round it away."""
    settings = make_node(tmp_path / "node", dtype="bfloat16")
    release = activate(settings, tiny_adapter(5, strength=1e-3), version=1)
    start = load_start(tiny_model(), release_directory(settings.data_dir, release.digest))
    module = tiny_adapter(5, strength=1e-3).modules["model.layers.0.mlp.up_proj"]
    merged = start.model.layers[0].mlp.up_proj.weight
    base = load_start(tiny_model(), None).model.layers[0].mlp.up_proj.weight
    assert torch.allclose(merged - base, torch.from_numpy(module.B @ module.A), atol=1e-7)


@pytest.mark.parametrize(
    ("setting", "count"), [("attention", 8), (["q_proj"], 2), (r".*\.1\.mlp\.down_proj", 1)]
)
def test_an_update_of_fewer_modules_is_whole_for_central(
    tmp_path: Path, setting: str | list[str], count: int
) -> None:
    settings = make_node(tmp_path, steps=3, target_modules=setting)
    meet(settings, activate(settings, tiny_adapter(3, strength=0.3), version=1).label, 8)
    assert Worker(settings, NODE_ID).step()
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    path = outbox.payload_path(entry.round_id)
    update = decode(path.read_bytes())
    assert len(update.modules) == count
    assert all(np.abs(module.B).max() > 0 for module in update.modules.values())
    manifest = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0])
    shapes = read_base_model(tiny_model()).module_shapes
    check_payload(path, manifest, shapes, 1e6)

    whole = tiny_adapter(7)
    mixed = merge(LoraTensors(), [(update, 0.5), (whole, 0.5)], rank=16, server_step=1.0, seed=0)
    for name, other in whole.modules.items():
        expected = 0.5 * other.B @ other.A
        if (mine := update.modules.get(name)) is not None:
            expected = expected + 0.5 * mine.scale * mine.B @ mine.A
        assert np.allclose(product(mixed.tensors, name), expected, atol=1e-4), name

    alone = merge(LoraTensors(), [(update, 1.0)], rank=16, server_step=1.0, seed=0).tensors
    release = tmp_path / "release"
    release.mkdir()
    for file, data in peft_files(alone, shapes).items():
        (release / file).write_bytes(data)
    start, base = load_start(tiny_model(), release), load_start(tiny_model(), None)
    for name in shapes:
        change = start.get_submodule(name).weight - base.get_submodule(name).weight
        assert bool(change.abs().max() > 0) is (name in update.modules), name


def product(release: LoraTensors, name: str) -> Any:
    module = release.modules[name]
    return module.B @ module.A


def test_what_a_plan_fixes_is_not_changed_by_later_settings(tmp_path: Path) -> None:
    settings = make_node(tmp_path / "node", steps=2, target_modules=["q_proj"])
    plan = make_plan(settings)
    later = train(plan, settings, tmp_path / "w", target_modules="all-linear", dtype="bfloat16")
    assert set(later.tensors.modules) == {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert RoundStore(settings.data_dir / "learning").unfinished() == plan


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"device": "cuda"}, "EDGE_LEARNING__DEVICE is 'cuda', and torch sees no CUDA device"),
        ({"target_modules": ["x_proj"]}, "EDGE_LEARNING__TARGET_MODULES names 'x_proj'"),
    ],
)
def test_what_is_not_there_ends_the_learner_with_the_reason(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: dict[str, Any],
    words: str,
) -> None:
    settings = make_node(tmp_path, **setting)
    plan = make_plan(settings)
    with pytest.raises(SettingsError):
        train(plan, settings, tmp_path / "w")
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    assert f"learner: {words}" in capsys.readouterr().err
