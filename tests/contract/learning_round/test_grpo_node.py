"""A grpo round of a whole learner: worker, control socket, middleware, outbox; a tiny sampler."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_node.doctor import node_status
from edge_node.environments import Task
from edge_node.learning import exploration
from edge_node.learning.exploration import make_exercises, make_held_out
from edge_node.learning.policies import Policies
from edge_node.learning.records import RoundImpossible, RoundStore
from edge_node.learning.worker import Worker
from edge_node.problems import Problems
from edge_node.rendering import load_renderer
from edge_node.serving import ControlClient, control_socket
from edge_node.settings import EdgeSettings
from protos.base import read_base_model
from protos.lora import LoraTensors
from protos.manifest import UpdateManifest
from tests.contract.learning_round.grpo_rounds import make_plan
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.even_words import EvenWords
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node, meet
from tests.fakes.policy_vllm import policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import tiny_adapter, tiny_model

EVEN = {"name": "even", "factory": "tests.fakes.even_words:EvenWords", "rollouts": True}
GRPO: dict[str, Any] = {
    "prompts": 8, "samples": 8, "max_answer_tokens": 2, "learning_rate": 2e-2, "steps": 12,
}  # fmt: skip


def explorer(data_dir: Path, grpo: dict[str, Any] = GRPO, **options: Any) -> EdgeSettings:
    settings = make_node(data_dir, grpo=grpo)
    environments = [*settings.model_dump()["environments"], EVEN | {"options": options}]
    return EdgeSettings.model_validate(settings.model_dump() | {"environments": environments})


def test_a_node_without_feedback_sends_what_it_learnt_from_its_verifier(tmp_path: Path) -> None:
    settings = explorer(tmp_path)
    release = activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, gateway):
        assert worker.step()
        assert not worker.step(), "the release has been explored"
        assert vllm.loaded.keys() == {f"lorikeet@{release.label}"}
        assert gateway.aliases.public == list(vllm.loaded)
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    manifest = UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0])
    assert manifest.start.release == release.digest
    metrics = manifest.metrics
    assert metrics["grpo"] == 1
    assert metrics["reward_last"] > metrics["reward_first"]
    assert metrics["held_out_tasks"] == 32
    assert metrics["held_out_policy"] > metrics["held_out_start"]
    assert manifest.experiences == metrics["examples"] == 60
    # Each step's policy has a name of its own, and is gone when nothing refers to it.
    steps = int(metrics["steps"])
    assert [name.rpartition("@")[2] for name in vllm.unloaded] == [
        str(step) for step in range(steps + 1)
    ]
    assert not policies_on_disk(settings)
    rollouts = [request for request in vllm.requests if "prompt" in request]
    assert len(rollouts) == steps * 8
    assert len({request["seed"] for request in rollouts}) == steps * 8
    assert {request["capture"] for request in vllm.requests} == {"off"}
    counts = asyncio.run(_counts(settings))
    assert counts == (0, 0), "rollouts are no experience"


async def _counts(settings: EdgeSettings) -> tuple[int, int]:
    status = await node_status(settings)
    return status["interactions"], status["feedback"]


def test_a_policy_that_is_no_better_is_not_sent_and_status_says_why(tmp_path: Path) -> None:
    # So slow that no greedy answer changes.
    settings = explorer(tmp_path, GRPO | {"steps": 1, "learning_rate": 1e-9})
    activate(settings, LoraTensors(), version=0)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, _):
        assert worker.step()
        status = asyncio.run(node_status(settings))
        assert len(vllm.loaded) == 1
    assert not outbox_of(settings).list()
    assert "(grpo) given up: on 32 held-out tasks the policy scores" in status["last_round"]
    assert "0 better, 0 worse" in status["last_round"]
    assert not policies_on_disk(settings)


def test_what_a_verifier_rewards_by_mistake_is_not_sent(tmp_path: Path) -> None:
    """The policy earns its reward on train tasks, and held-out tasks tell that it is worse."""
    settings = explorer(tmp_path, GRPO | {"steps": 9}, cheated=True)
    activate(settings, LoraTensors(), version=0)
    worker, rewards = Worker(settings, NODE_ID), []
    with sampling_vllm(settings), pytest.MonkeyPatch.context() as patch:
        train = exploration.train_grpo

        def keep(*args: Any, **kwargs: Any) -> Any:
            trained = train(*args, **kwargs)
            rewards.extend(trained.metrics[name] for name in ("reward_first", "reward_last"))
            return trained

        patch.setattr(exploration, "train_grpo", keep)
        assert worker.step()
    assert not outbox_of(settings).list()
    (end,) = RoundStore(settings.data_dir / "learning").ends()
    assert (end.state, end.result[:38]) == ("given up", "on 32 held-out tasks the policy scores")
    assert rewards[1] > rewards[0] + 0.2


def test_a_saturated_release_makes_no_further_rounds(tmp_path: Path) -> None:
    settings = explorer(tmp_path, GRPO | {"max_answer_tokens": 1, "steps": 2}, count=4, always=1.0)
    release = activate(settings, LoraTensors(), version=0)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings):
        assert worker.step()
        assert not worker.step()
        status = asyncio.run(node_status(settings))
        assert "(grpo) nothing to gain: all 8 answers to each of 16 tasks" in status["last_round"]
        assert not Problems(settings.data_dir).current()
        meet(settings, release.label, 6)
        plan = worker._next_round()
        assert plan is not None
        assert plan.method == "sft", "corrections are still learnt from"


def test_feedback_that_came_during_a_grpo_round_is_left_for_sft(tmp_path: Path) -> None:
    settings = explorer(tmp_path)
    release = activate(settings, LoraTensors(), version=0)
    meet(settings, release.label, 3)
    worker = Worker(settings, NODE_ID)
    plan = worker._next_round()
    assert plan is not None
    assert (plan.method, plan.cursor) == ("grpo", 0)
    RoundStore(settings.data_dir / "learning").finish(plan.round_id, "u")
    meet(settings, release.label, 3, first=10)
    after = worker._next_round()
    assert after is not None
    assert (after.method, after.number, after.cursor) == ("sft", 2, 6)


def test_a_policy_that_vllm_cannot_serve_is_a_problem_before_the_round(tmp_path: Path) -> None:
    settings = explorer(tmp_path)
    serving = settings.serving.model_copy(update={"max_lora_rank": 8})
    settings = settings.model_copy(update={"serving": serving})
    release = activate(settings, tiny_adapter(1, rank=2), version=1)
    worker = Worker(settings, NODE_ID)
    assert not worker.step()
    (problem,) = Problems(settings.data_dir).current()
    assert problem.text == (
        f"No grpo round can start: release {release.label} has rank 2, a round adds 8, and this "
        "node serves adapters up to rank 8."
    )
    activate(settings, LoraTensors(), version=0)
    assert worker._next_round() is not None
    assert not Problems(settings.data_dir).current()


def test_a_killed_learners_policies_are_swept(tmp_path: Path) -> None:
    settings = explorer(tmp_path, GRPO | {"steps": 1})
    activate(settings, LoraTensors(), version=0)
    with sampling_vllm(settings) as (vllm, _):
        folder = settings.data_dir / "learning" / "policies"
        control = ControlClient(control_socket(settings.data_dir))
        shapes = read_base_model(settings.base.path or tmp_path).module_shapes
        killed = Policies(folder, control, "r1", LoraTensors(), shapes)
        left = asyncio.run(killed.publish(3, tiny_adapter(1)))
        assert left in vllm.loaded
        assert Worker(settings, NODE_ID).step()
        assert left in vllm.unloaded
        assert not policies_on_disk(settings)


def test_a_task_is_trained_on_as_often_as_its_weight_says() -> None:
    class Weighted(EvenWords):
        def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
            tasks = super().tasks(split, count=count, seed=seed)
            return [replace(task, weight=9.0 if task.id.endswith("3") else 0.5) for task in tasks]

    plan = make_plan(steps=40)
    renderer = load_renderer(tiny_model())
    exercises = make_exercises(plan, {"even": Weighted()}, renderer, 512)
    heavy = [one for one in exercises if one.task.id.endswith("3")]
    assert len(exercises) == 320
    assert 0.57 < len(heavy) / len(exercises) < 0.77, "54 of 81"
    assert len({one.seed for one in exercises}) == 320, "the same task again has other samples"
    held_out = make_held_out(plan, {"even": Weighted()}, renderer, 512)
    assert len({one.task.id for one in held_out}) == 32, "measured once each"


@pytest.mark.parametrize("limit", [4, 3])
def test_a_task_that_leaves_no_room_for_its_answer(tmp_path: Path, limit: int) -> None:
    renderer = load_renderer(tiny_model())
    plan = make_plan(steps=1)  # prompts of 3 tokens, answers of 2
    for make in (make_exercises, make_held_out):
        with pytest.raises(RoundImpossible, match=f"prompts may have {limit - 2} tokens here"):
            make(plan, {"even": EvenWords()}, renderer, limit)
    assert len(make_exercises(plan, {"even": EvenWords()}, renderer, 5)) == 8
    assert len(make_held_out(plan, {"even": EvenWords()}, renderer, 5)) == 32
    with pytest.raises(RoundImpossible, match="of its 0 held_out tasks none leaves room"):
        make_held_out(plan, {"even": EvenWords(count=0)}, renderer, 5)
