"""A grpo round whose verifier no answer satisfies at first."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_node import rounds as node_rounds
from edge_node.doctor import node_status
from edge_node.experience import Example
from edge_node.learning import reports
from edge_node.learning.plans import RoundPlan, WarmPlan
from edge_node.learning.records import NoReward, NothingToGain, RoundStore
from edge_node.learning.reports import Progress
from edge_node.learning.steering import NodeSteering
from edge_node.learning.training import TrainedRound
from edge_node.learning.warm import warm_lessons, warm_start
from edge_node.learning.worker import Worker
from edge_node.learning.workplace import Workplace
from edge_node.problems import Problems
from edge_node.rendering import load_renderer
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest
from tests.contract.learning_round.grpo_rounds import SAMPLES, exercises_of, folder_for, make_plan
from tests.contract.learning_round.outboxes import outbox_of
from tests.contract.learning_round.test_grpo import Killed, train
from tests.contract.learning_round.test_grpo_keeping import assert_same
from tests.fakes.hidden_words import HiddenWords
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node
from tests.fakes.policy_rollouts import PolicyRollouts
from tests.fakes.policy_vllm import sampling_vllm
from tests.fakes.tiny_model import answer_ids, prompt_ids, tiny_model

GRPO: dict[str, Any] = {
    "prompts": 4, "samples": 8, "max_answer_tokens": 3, "learning_rate": 2e-2, "steps": 6,
    "warm_steps": 6,
}  # fmt: skip


def node(data_dir: Path, options: dict[str, Any], **grpo: Any) -> EdgeSettings:
    settings = make_node(data_dir, grpo=GRPO | grpo, supersede_after_s=600, learning_rate=2e-2)
    hidden = {
        "name": "hidden", "factory": "tests.fakes.hidden_words:HiddenWords", "rollouts": True,
        "options": options,
    }  # fmt: skip
    fields = settings.model_dump()
    return EdgeSettings.model_validate(fields | {"environments": [*fields["environments"], hidden]})


def last_round(settings: EdgeSettings) -> str:
    return str(asyncio.run(node_status(settings))["last_round"])


def test_a_verifier_that_no_answer_satisfies_is_learnt_after_a_warm_start(tmp_path: Path) -> None:
    settings = node(tmp_path, {})
    activate(settings, LoraTensors(), version=0)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings):
        assert worker.step()
        assert "(grpo) no reward: all 8 answers to each of 20 tasks got the same reward, 0 in" in (
            last_round(settings)
        )
        assert worker.step(), "it does not wait: nothing was sent"
        assert not worker.step()
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    metrics = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics
    assert (metrics["warm_steps"], metrics["warm_examples"]) == (6, 24)
    assert 0 < metrics["reward_first"] <= metrics["reward_last"]
    assert metrics["held_out_start"] == 0
    assert metrics["held_out_policy"] > 0.5
    assert metrics["kl_release"] > 0


def test_the_warm_start_is_told_as_such_and_can_be_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = node(tmp_path, {}, steps=2)
    activate(settings, LoraTensors(), version=0)
    worker, rounds = Worker(settings, NODE_ID), RoundStore(settings.data_dir / "learning")
    plan = worker._next_round()
    assert plan is not None
    rounds.end_unrewarded(plan.round_id, "why")
    seen: list[tuple[str, int | None, int, str]] = []
    tell = NodeSteering.tell

    def told(self: NodeSteering, progress: Progress) -> None:
        tell(self, progress)
        shown = node_rounds.list_rounds(settings)[0]
        stage = node_rounds.show_round(settings, shown.round_id)["progress"]["stage"]
        seen.append((stage, shown.steps_done, shown.steps, shown.state))
        if len(seen) == 3:
            node_rounds.cancel_round(settings, None)

    monkeypatch.setattr(NodeSteering, "tell", told)
    monkeypatch.setattr(reports, "PAUSE_S", 0)
    with sampling_vllm(settings):
        assert worker.step()
        assert seen == [("warm start", 0, 2, "training")] * 3
        assert [end.state for end in rounds.ends()] == ["cancelled", "no reward"]
        node_rounds.ask_for_round(settings, "grpo")
        assert worker.step()
    assert [one[:3] for one in seen[3:]] == [("warm start", 0, 2)] * 6 + [("", 1, 2), ("", 2, 2)]


def test_a_warm_round_that_fails_is_not_tried_again_at_once(tmp_path: Path) -> None:
    settings = node(tmp_path, {})
    activate(settings, LoraTensors(), version=0)
    worker, rounds = Worker(settings, NODE_ID), RoundStore(settings.data_dir / "learning")
    for end in (rounds.end_unrewarded, rounds.abandon):
        plan = worker._next_round()
        assert plan is not None
        assert plan.grpo is not None
        assert (plan.grpo.warm is None) is (plan.number == 1)
        end(plan.round_id, "why")
    assert worker._next_round() is None


@pytest.mark.parametrize(("warm_steps", "ends"), [(6, ["no reward", "nothing to gain"]), (0, [])])
def test_without_any_reward_a_second_time_it_is_over(
    tmp_path: Path, warm_steps: int, ends: list[str]
) -> None:
    """And at once where a warm start is switched off."""
    settings = node(tmp_path, {}, warm_steps=warm_steps)
    activate(settings, LoraTensors(), version=0)
    worker, rounds = Worker(settings, NODE_ID), RoundStore(settings.data_dir / "learning")
    for state in ends or ["nothing to gain"]:
        plan = worker._next_round()
        assert plan is not None
        worker._end_without_gain(plan, NoReward("why"))
        assert rounds.ends(1)[0].state == state
    assert worker._next_round() is None
    assert not Problems(settings.data_dir).current()


def test_what_the_examples_are() -> None:
    plan, renderer = make_plan(steps=2), load_renderer(tiny_model())
    stored = [Example("f", "i", prompt_ids("w1"), answer_ids("w2"), "correction", "m")]
    exercises = exercises_of(plan, HiddenWords())
    lessons = warm_lessons(exercises * 2, renderer, 3, stored)
    assert [lesson.prompt_ids for lesson in lessons] == [one.prompt_ids for one in exercises]
    assert {tuple(lesson.target_ids) for lesson in lessons} == {answer_ids("w7 w8")}
    cut = warm_lessons(exercises, renderer, 2, stored)
    assert [(lesson.prompt_ids, lesson.target_ids) for lesson in cut] == [
        (prompt_ids("w1"), answer_ids("w2"))
    ]
    for options in ({"known": False}, {"wrong": True}):
        exercises = exercises_of(plan, HiddenWords(**options))
        assert len(warm_lessons(exercises, renderer, 3, stored)) == 1
        with pytest.raises(NothingToGain, match="no verified example is known"):
            warm_lessons(exercises, renderer, 3, [])


def warm_plan() -> RoundPlan:
    plan = make_plan(steps=2, batch_own=3, checkpoint_steps=2)
    assert plan.grpo is not None
    warm = WarmPlan(steps=9, learning_rate=2e-2, cursor=0)
    changes = {"warm": warm, "max_answer_tokens": 3}
    return plan.model_copy(update={"grpo": plan.grpo.model_copy(update=changes)})


def run(workspace: Path, *, warm_ends: int = 99, rollouts_end: str = "") -> TrainedRound:
    """Killed after so many warm steps, or when this policy is asked."""
    plan, warm_steps = warm_plan(), 0
    exercises = exercises_of(plan, HiddenWords())

    def obsolete() -> bool:
        nonlocal warm_steps
        warm_steps += 1
        if warm_steps > warm_ends:
            raise Killed
        return False

    def fails(model: str, ask: Any) -> bool:
        if rollouts_end and model.endswith(rollouts_end):
            raise Killed
        return False

    warm = partial(
        warm_start, plan, Workplace(tiny_model(), None, workspace, obsolete=obsolete), anchors=[],
        lessons=warm_lessons(exercises, load_renderer(tiny_model()), 3, []),
    )  # fmt: skip
    rollouts = PolicyRollouts(SAMPLES, max_tokens=3, fails=fails)
    return train(plan, rollouts, workspace, exercises=exercises, warm=warm)


def test_a_kill_at_any_step_of_it_changes_no_byte(tmp_path: Path) -> None:
    whole = run(folder_for(tmp_path, "whole"))
    workspace = folder_for(tmp_path, "killed")
    for kill in ({"warm_ends": 5}, {"rollouts_end": "@0"}):
        with pytest.raises(Killed):
            run(workspace, **kill)
    assert_same(run(workspace), whole)
