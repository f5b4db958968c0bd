"""A grpo round of a whole learner on an environment of agents, in their own process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from edge_node.episodes import Trajectory
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.learning.exploration import _environments, make_exercises
from edge_node.learning.grpo import _ask
from edge_node.learning.plans import GrpoPlan
from edge_node.learning.records import RoundStore
from edge_node.learning.rollouts import Answer, Ask, VllmRollouts
from edge_node.learning.worker import Worker
from edge_node.problems import Problems
from edge_node.rendering import load_renderer
from edge_node.serving import ControlClient, control_socket
from edge_node.settings import EdgeSettings
from protos.manifest import UpdateManifest
from tests.contract.learning_round.grpo_rounds import make_plan
from tests.contract.learning_round.outboxes import outbox_of
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate, make_node
from tests.fakes.policy_vllm import policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import tiny_adapter, tiny_model

EVEN = {"name": "even", "factory": "tests.fakes.even_words:EvenWords", "rollouts": True}
GRPO: dict[str, Any] = {
    "prompts": 8, "samples": 8, "max_answer_tokens": 2, "learning_rate": 2e-2, "steps": 12,
}  # fmt: skip


def agents(**options: Any) -> dict[str, Any]:
    return {
        "name": "desk", "factory": "tests.fakes.agents:EvenAgent", "rollouts": True,
        "options": options,
    }  # fmt: skip


def node(data_dir: Path, *environments: dict[str, Any], **grpo: Any) -> EdgeSettings:
    settings = make_node(data_dir, grpo=GRPO | grpo)
    every = [*settings.model_dump()["environments"], *environments]
    return EdgeSettings.model_validate(settings.model_dump() | {"environments": every})


def metrics_of(settings: EdgeSettings) -> dict[str, float]:
    outbox = outbox_of(settings)
    (entry,) = outbox.list()
    return dict(UpdateManifest.from_bytes(outbox.signed(entry.update_id)[0]).metrics)


@pytest.mark.slow
def test_a_node_learns_from_an_agent_that_asks_its_endpoint(tmp_path: Path) -> None:
    settings = node(tmp_path, agents(how="none", fails="7"), steps=8)
    activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    worker = Worker(settings, NODE_ID)
    with sampling_vllm(settings) as (vllm, gateway):
        assert worker.step()
        assert not gateway.sessions._open, "every session was read"
        assert not gateway.aliases.in_flight
    metrics = metrics_of(settings)
    assert metrics["reward_last"] > metrics["reward_first"] + 0.1
    assert metrics["held_out_policy"] > metrics["held_out_start"]
    # A tenth of the tasks never knows a reward: left out, and no bad mark.
    assert 0 < metrics["unscored"] < 0.2 * metrics["steps"] * 64
    assert 20 < metrics["held_out_tasks"] < 32
    assert metrics["kl_release"] > 0
    assert not policies_on_disk(settings)
    assert not Problems(settings.data_dir).current()
    policies = {one["model"] for one in vllm.requests if one["model"].startswith("policy/")}
    assert len(policies) == metrics["steps"] + 1, "each step's runs asked its own policy"


@pytest.mark.slow
def test_agents_that_crash_are_said_and_do_not_end_a_round_on_others(tmp_path: Path) -> None:
    settings = node(tmp_path, EVEN, agents(how="crash"), steps=8)
    activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    with sampling_vllm(settings) as (_, gateway):
        assert Worker(settings, NODE_ID).step()
        assert not gateway.sessions._open
    metrics = metrics_of(settings)
    assert metrics["reward_last"] > metrics["reward_first"]
    assert metrics["unscored"] == metrics["steps"] * 32
    assert metrics["held_out_tasks"] == 16
    (problem,) = Problems(settings.data_dir).current()
    assert problem.room == "agents"
    assert "learns nothing from an environment of agents" in problem.text
    assert "edge-node environments check desk" in problem.next_step
    Worker(settings, NODE_ID)
    assert not Problems(settings.data_dir).current(), "settings may have changed at a restart"


def test_a_round_on_agents_alone_that_crash_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "_rest", lambda self, pause_s: None)
    settings = node(tmp_path, agents(how="crash"))
    activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    with sampling_vllm(settings):
        assert Worker(settings, NODE_ID).step()
    assert RoundStore(settings.data_dir / "learning").unfinished() is not None
    (problem,) = Problems(settings.data_dir).current()
    assert "waits for an environment. Environment 'desk'" in problem.text


PLAN = GrpoPlan(
    environments=["desk"], prompts=2, samples=3, max_answer_tokens=2, temperature=1.0, beta=0.0
)


def way(reward: float) -> Trajectory:
    return Trajectory([1], [2], [-0.1], [True], 1, reward)


class Runs:
    """`ends` of the runs of one group, again and again."""

    def __init__(self, *ends: Trajectory | Exception | None) -> None:
        self._ends = ends
        self.asked: list[tuple[str, int, dict[str, Any]]] = []

    async def __call__(self, model: str, seed: int, **how: Any) -> Trajectory | None:
        self.asked.append((model, seed, how))
        end = self._ends[(len(self.asked) - 1) % len(self._ends)]
        if isinstance(end, Exception):
            raise end
        return end


CRASH = EnvironmentFault("desk", "it crashed")
RAISED = EnvironmentFault("desk", "it raised", raised=True)
FAILED = Answer([], [], "")


async def sampled(
    data_dir: Path, *asks: Ask
) -> tuple[Sequence[Any], list[EnvironmentFault | None]]:
    told: list[EnvironmentFault | None] = []
    settings = make_node(data_dir)
    activate(settings, tiny_adapter(1, rank=2), version=1)
    with sampling_vllm(settings):
        rollouts = VllmRollouts(
            ControlClient(control_socket(settings.data_dir)), PLAN, in_flight=2, yield_above=0,
            trouble=told.append,
        )  # fmt: skip
        return await rollouts.sample("policy/r1@0", asks), told


def test_the_sampled_tokens_of_two_turns_come_through_the_session_port(tmp_path: Path) -> None:
    settings = node(tmp_path, agents(turns=2))
    release = activate(settings, tiny_adapter(1, rank=2), version=1)
    renderer = load_renderer(tiny_model())
    plan = make_plan(grpo=PLAN, steps=1)
    with sampling_vllm(settings) as (vllm, gateway), ExitStack() as held:
        environments = _environments(PLAN, settings, held)
        exercises = make_exercises(plan, environments, renderer, 512)
        control = ControlClient(control_socket(settings.data_dir))
        rollouts = VllmRollouts(control, PLAN, in_flight=2, yield_above=0)
        asks = [_ask(exercise) for exercise in exercises]

        def sampled() -> Sequence[Any]:
            return asyncio.run(rollouts.sample(f"lorikeet@{release.label}", asks))

        first = sampled()
        assert first == sampled(), "the same version, tasks and seeds"
        assert not gateway.sessions._open
    assert [len(group) for group in first] == [3, 3]
    for exercise, group in zip(exercises, first, strict=True):
        for answer in group:
            way = answer.episode
            assert way.prompt_ids == list(renderer.prompt_ids(exercise.task.messages))
            assert way.reward in (0.0, 1.0)
            assert 1 <= sum(way.sampled) <= 4
            assert all(
                value < 0 for value, own in zip(way.logprobs, way.sampled, strict=True) if own
            )
    assert len({request["seed"] for request in vllm.requests}) == 12


async def test_runs_that_fail_are_answers_without_tokens(tmp_path: Path) -> None:
    runs = Runs(way(1.0), RAISED, None)
    (group,), told = await sampled(tmp_path, Ask((), 5, run=runs, environment="desk"))
    assert group == [Answer([2], [-0.1], "", way(1.0)), FAILED, FAILED]
    assert told == [None], "one that works at times is no problem"
    assert {model for model, _, _ in runs.asked} == {"policy/r1@0"}
    assert len({seed for _, seed, _ in runs.asked}) == 3
    assert {(how["temperature"], how["max_answer_tokens"]) for _, _, how in runs.asked} == {
        (1.0, 2)
    }


async def test_agents_that_all_crash_end_only_a_round_without_others(tmp_path: Path) -> None:
    desk = Ask((), 5, run=Runs(CRASH), environment="desk")
    fine = Ask((), 6, run=Runs(way(0.0)), environment="fine")
    (first, second), told = await sampled(tmp_path / "both", desk, fine)
    assert first == [FAILED] * 3
    assert second == [Answer([2], [-0.1], "", way(0.0))] * 3
    assert told == [CRASH]
    with pytest.raises(EnvironmentFault, match="it crashed"):
        await sampled(tmp_path / "alone", desk)


async def test_a_group_of_which_vllm_lost_a_run_is_asked_again(tmp_path: Path) -> None:
    runs = Runs(way(1.0), ServingError("lost"), way(1.0))
    groups, told = await sampled(tmp_path, Ask((), 5, run=runs, environment="desk"))
    assert groups == [None]
    assert told == [None]
