"""A grpo round that is kept near the base, and how far any round moves from its release."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_node.learning import grpo, training
from edge_node.learning.anchors import Anchors, read_anchors
from edge_node.learning.batches import IGNORED, Lesson, TokenRow
from edge_node.learning.compute import PLAIN
from edge_node.learning.plans import RoundPlan
from edge_node.learning.records import NothingToGain
from edge_node.learning.text_model import load_text_model
from edge_node.learning.training import load_start, train_round
from edge_node.learning.workplace import Workplace
from protos.base import read_base_model
from protos.lora import encode
from tests.contract.learning_round.grpo_rounds import SAMPLES, exercises_of, folder_for, make_plan
from tests.contract.learning_round.test_grpo import train
from tests.contract.learning_round.test_keeping import dense_kl
from tests.fakes.anchors import make_tiny_anchors
from tests.fakes.even_words import EvenWords
from tests.fakes.policy_rollouts import PolicyRollouts
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_adapter, tiny_model, write_peft


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Anchors:
    folder = make_tiny_anchors(tmp_path_factory.mktemp("made") / "anchors")
    return read_anchors(folder, read_base_model(tiny_model()).digest)


@contextmanager
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, float]]]:
    """What the trainer logs of each step."""
    seen: list[dict[str, float]] = []

    class Looking(grpo.RoundTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            seen.append(logs)
            super().log(logs, start_time)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "RoundTrainer", Looking)
        yield seen


def test_a_grpo_round_learns_and_stays_near_the_base(tmp_path: Path, samples: Anchors) -> None:
    near, far = (
        train(
            make_plan(kl=kl, batch_anchor=6, steps=9), PolicyRollouts(SAMPLES),
            folder_for(tmp_path, f"kl-{kl}"), samples=samples,
        ).metrics
        for kl in (0.5, 0.0)
    )  # fmt: skip
    assert near["kl_first"] == far["kl_first"] < 1e-3
    assert near["kl_last"] < far["kl_last"] / 2
    assert near["reward_last"] > near["reward_first"] + 0.1


def test_a_kept_round_resumes_to_the_same_bytes(tmp_path: Path, samples: Anchors) -> None:
    plan = make_plan(batch_anchor=6, steps=4)
    whole = train(plan, PolicyRollouts(SAMPLES), folder_for(tmp_path, "whole"), samples=samples)
    workspace = folder_for(tmp_path, "killed")

    class Killed(BaseException):
        pass

    def killed(model: str, ask: Any) -> bool:
        if model.endswith("@3"):
            raise Killed
        return False

    with pytest.raises(Killed):
        train(plan, PolicyRollouts(SAMPLES, fails=killed), workspace, samples=samples)
    resumed = train(plan, PolicyRollouts(SAMPLES), workspace, samples=samples)
    assert_same(resumed, whole)


def assert_same(resumed: Any, whole: Any) -> None:
    assert encode(resumed.tensors) == encode(whole.tensors)
    of_both = [
        {name: value for name, value in one.metrics.items() if name != "seconds"}
        for one in (resumed, whole)
    ]
    assert of_both[0] == of_both[1]


def test_the_base_is_weighed_once_a_step_however_it_is_divided(
    tmp_path: Path, samples: Anchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no task teaches anything, the divergence is all of the loss and of its gradient."""
    release = write_peft(tiny_adapter(3, strength=0.4), tmp_path / "release")
    plan = make_plan(batch_anchor=9, steps=1, kl=2.0, release_rank=4)
    found = []
    for number, (together, tokens) in enumerate([(64, None), (8, None), (64, 12)]):
        monkeypatch.setattr(grpo, "MAX_SEQUENCES", together)
        with logged(monkeypatch) as seen, pytest.raises(NothingToGain):
            train_flat(
                plan, folder_for(tmp_path, str(number)), release=release, samples=samples,
                compute=replace(PLAIN, batch_tokens=tokens),
            )  # fmt: skip
        found.append((seen[0]["kl_base"], seen[0]["loss"], seen[0]["grad_norm"]))
    base, start = load_text_model(tiny_model()), load_start(tiny_model(), release)
    expected = dense_kl(base, start, [sample.ids for sample in samples.samples]).item()
    for kl, loss, norm in found:
        assert kl == pytest.approx(expected, rel=0.02)
        assert loss == pytest.approx(2 * kl, rel=1e-4)
        assert norm == pytest.approx(found[0][2], rel=1e-3)
    assert found[0][2] > 0.1


def train_flat(plan: RoundPlan, workspace: Path, **options: Any) -> None:
    verifier = EvenWords(always=0.1)
    train(
        plan, PolicyRollouts(SAMPLES), workspace, exercises=exercises_of(plan, verifier), **options
    )


def test_groups_without_variance_have_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what rounding leaves of the mean: Adam would make a whole step of it."""
    plan = make_plan(steps=1)
    with logged(monkeypatch) as seen, pytest.raises(NothingToGain):
        train(
            plan, PolicyRollouts(SAMPLES), tmp_path,
            exercises=exercises_of(plan, EvenWords(always=0.7)),
        )  # fmt: skip
    assert seen[0]["groups_skipped"] == 8
    assert seen[0]["grad_norm"] == 0


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_divergence_from_the_release_is_measured_at_any_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(grpo, "MAX_SEQUENCES", 64)
    found = []
    for beta in (0.0, 1e-12):
        plan = make_plan(steps=2)
        assert plan.grpo is not None
        changes = {"beta": beta, "temperature": temperature}
        plan = plan.model_copy(update={"grpo": plan.grpo.model_copy(update=changes)})
        with logged(monkeypatch) as seen:
            metrics = train(plan, PolicyRollouts(SAMPLES), folder_for(tmp_path, str(beta))).metrics
        steps = [entry for entry in seen if "kl_release" in entry]
        found.append([entry["kl_release"] for entry in steps])
        assert metrics["kl_release"] == found[-1][-1]
        assert "kl" not in metrics
    assert found[0][0] == pytest.approx(0, abs=1e-6), "the first policy is the release"
    assert found[0][-1] > 0.001
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)
    trl_says = [entry["kl"] for entry in steps]
    assert found[1] == pytest.approx(trl_says, rel=1e-3, abs=1e-6)


def test_an_sft_round_measures_it_on_its_last_own_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TokenRow] = []
    real = training.kl_of_examples

    def keep(trainer: Any, rows: Any) -> float:
        seen.extend(rows)
        return real(trainer, rows)

    monkeypatch.setattr(training, "kl_of_examples", keep)
    release = write_peft(tiny_adapter(3, strength=0.3), tmp_path / "release")
    own = [Lesson(prompt_ids(f"w{n}"), answer_ids(f"w{n + 9} w3")) for n in range(5)]
    beside = [Lesson(prompt_ids("w99"), answer_ids("w98"))]
    trained = train_round(
        make_plan(grpo=None, batch_own=3, batch_anchor=2, steps=6, release_rank=4),
        Workplace(tiny_model(), release, folder_for(tmp_path, "w")), own=own, anchors=beside,
    )  # fmt: skip
    assert len(seen) == 3
    assert all(row.input_ids[1] != prompt_ids("w99")[1] for row in seen)
    start, total, tokens = load_start(tiny_model(), release), 0.0, 0
    for row in seen:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            mine, before = (
                torch.log_softmax(model(input_ids=ids).logits[0], -1)
                for model in (trained.model, start)
            )
        for place, label in enumerate(row.labels[1:]):
            if label != IGNORED:
                total += (mine[place].exp() * (mine[place] - before[place])).sum().item()
                tokens += 1
    assert trained.metrics["kl_release"] == pytest.approx(total / tokens, rel=1e-3)
    assert total / tokens > 0.1
