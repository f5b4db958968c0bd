"""What a grpo round learns, with the real TRL and PEFT on a tiny random Llama."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_node.errors import ServingError, SettingsError
from edge_node.learning import trl_rollouts
from edge_node.learning.compute import PLAIN, Compute
from edge_node.learning.grpo import train_grpo
from edge_node.learning.plans import RoundPlan
from edge_node.learning.policies import read_release
from edge_node.learning.records import NothingToGain, RoundImpossible
from edge_node.learning.rollouts import Ask
from edge_node.learning.training import TrainedRound
from edge_node.learning.workplace import Workplace
from protos.lora import encode
from tests.contract.learning_round.grpo_rounds import (
    SAMPLES,
    exercises_of,
    folder_for,
    make_plan,
)
from tests.fakes.even_words import EvenWords
from tests.fakes.policy_rollouts import PolicyRollouts
from tests.fakes.tiny_model import tiny_adapter, tiny_model, write_peft


class Killed(BaseException):
    pass


def train(
    plan: RoundPlan,
    rollouts: PolicyRollouts,
    workspace: Path,
    release: Path | None = None,
    compute: Compute = PLAIN,
    **options: Any,
) -> TrainedRound:
    place = Workplace(tiny_model(), release, workspace, compute=compute)
    defaults: dict[str, Any] = {"exercises": exercises_of(plan)}
    return train_grpo(
        plan, place, rollouts=rollouts, publish=rollouts.publish, **defaults | options
    )


def test_a_round_learns_what_the_verifier_likes(tmp_path: Path) -> None:
    plan, rollouts = make_plan(), PolicyRollouts(SAMPLES)
    trained = train(plan, rollouts, tmp_path)
    metrics = trained.metrics
    assert 0.2 < metrics["reward_first"] < 0.8
    assert metrics["reward_last"] == 1
    assert metrics["grpo"] == 1
    assert metrics["unscored"] == 0
    steps = int(metrics["steps"])
    assert steps < plan.steps, "it stops when all answers are right"
    assert 5 * 8 <= metrics["groups_skipped"] < steps * 8
    assert metrics["examples"] == 60, "distinct tasks"
    # A policy for each step, and the last one for whoever measures it.
    assert rollouts.published == list(range(steps + 1))
    assert [model for model, _ in rollouts.asked] == [
        f"policy/test@{step}" for step in range(steps) for _ in range(8)
    ]
    assert all(np.abs(module.B).max() > 0 for module in trained.tensors.modules.values())
    assert {module.scale for module in trained.tensors.modules.values()} == {2.0}


def test_rollouts_are_drawn_from_what_is_trained(tmp_path: Path) -> None:
    """On a release of its own rank: the log-probabilities of both sides agree at each step."""
    release = tiny_adapter(3, rank=2, strength=0.3)
    folder = write_peft(release, tmp_path / "release")
    assert encode(read_release(folder)) == encode(release)
    seen: list[float] = []

    from edge_node.learning import grpo

    class Looking(grpo.RoundTrainer):
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            key = "sampling/sampling_logp_difference/max"
            seen.extend(logs[name] for name in [key] if name in logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "RoundTrainer", Looking)
        plan = make_plan(steps=4, release_rank=2)
        train(
            plan,
            PolicyRollouts(SAMPLES, release=release),
            folder_for(tmp_path, "w"),
            release=folder,
        )
    assert len(seen) == 4
    assert max(seen) < 1e-3


def test_killed_round_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    plan = make_plan(steps=7)
    whole = train(plan, PolicyRollouts(SAMPLES), folder_for(tmp_path, "whole"))

    def killed(model: str, ask: Ask) -> bool:
        if model.endswith("@5"):
            raise Killed
        return False

    workspace = folder_for(tmp_path, "killed")
    with pytest.raises(Killed):
        train(plan, PolicyRollouts(SAMPLES, fails=killed), workspace)
    again = PolicyRollouts(SAMPLES)
    resumed = train(plan, again, workspace)
    assert again.published[0] == 4, "it goes on from the newest checkpoint"
    assert encode(resumed.tensors) == encode(whole.tensors)
    same = {name: value for name, value in whole.metrics.items() if name != "seconds"}
    assert resumed.metrics | same == resumed.metrics


def test_a_failed_request_is_asked_again_and_then_left_out(tmp_path: Path) -> None:
    plan, failures = make_plan(steps=2), []

    def fails(model: str, ask: Ask) -> bool:
        failures.append(ask)
        return ask == failures[0]

    rollouts = PolicyRollouts(SAMPLES, fails=fails)
    metrics = train(plan, rollouts, tmp_path).metrics
    assert failures.count(failures[0]) == 2
    assert rollouts.published == [0, 0, 1, 2], "a new vLLM does not know the policy"
    assert metrics["unscored"] == SAMPLES
    assert metrics["groups_skipped"] >= 1


def test_a_vllm_that_answers_nothing_ends_the_round_for_now(tmp_path: Path) -> None:
    rollouts = PolicyRollouts(SAMPLES, fails=lambda model, ask: True)
    with pytest.raises(ServingError, match="answered none of 8 rollout requests"):
        train(make_plan(), rollouts, tmp_path)


def test_what_a_verifier_cannot_judge_is_no_bad_mark_and_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(steps=2)
    with caplog.at_level(logging.WARNING):
        metrics = train(
            plan,
            PolicyRollouts(SAMPLES),
            tmp_path,
            exercises=exercises_of(plan, EvenWords(faulty="13")),
        ).metrics
    # Of ten last digits five are right, and two of the wrong ones are left out.
    assert metrics["unscored"] > 8
    assert metrics["groups_skipped"] < 16
    assert "a verifier raised" in caplog.text
    assert "cannot judge" not in caplog.text
    assert "following kwargs" not in caplog.text


def test_a_verifier_that_always_raises_makes_the_round_impossible(tmp_path: Path) -> None:
    plan = make_plan()

    class Broken(EvenWords):
        def verify(self, task: Any, answer: str) -> Any:
            raise KeyError(answer)

    with pytest.raises(RoundImpossible, match="No answer of step 1 got a reward"):
        train(plan, PolicyRollouts(SAMPLES), tmp_path, exercises=exercises_of(plan, Broken()))


def test_a_round_without_differences_ends_early(tmp_path: Path) -> None:
    plan, rollouts = make_plan(), PolicyRollouts(SAMPLES)

    class Pleased(EvenWords):
        def verify(self, task: Any, answer: str) -> Any:
            from edge_node.environments import Outcome

            return Outcome(True, 1.0, "", None)

    with pytest.raises(NothingToGain, match="each of 40 tasks got the same reward, 1 in the mean"):
        train(plan, rollouts, tmp_path, exercises=exercises_of(plan, Pleased()))
    assert rollouts.published == [0, 1, 2, 3, 4]


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trl_rollouts.check_trl()
    monkeypatch.setattr(trl_rollouts.trl, "__version__", "1.17.0")
    monkeypatch.setitem(trl_rollouts._READ, "_generate", ("quite_another_name",))
    with pytest.raises(SettingsError, match=r"not 1\.16\.\*; .*does not use quite_another_name"):
        trl_rollouts.check_trl()
