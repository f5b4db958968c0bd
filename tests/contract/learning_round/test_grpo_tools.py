"""A grpo round on an environment with tools: what is learnt from an episode, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_node.environments import Episodes, Task
from edge_node.episodes import Rules, Sample, Trajectory, Turn
from edge_node.errors import EnvironmentFault
from edge_node.learning import gain
from edge_node.learning.exploration import _environments, make_exercises
from edge_node.learning.grpo import train_grpo
from edge_node.learning.plans import GrpoPlan, RoundPlan
from edge_node.learning.policies import Policies
from edge_node.learning.records import RoundImpossible
from edge_node.learning.rewards import Exercise
from edge_node.learning.rollouts import Answer, Ask, VllmRollouts
from edge_node.learning.training import TrainedRound
from edge_node.learning.workplace import Workplace
from edge_node.rendering import load_renderer
from edge_node.serving import ControlClient, control_socket
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.contract.learning_round.grpo_rounds import (
    SAMPLES,
    exercises_of,
    folder_for,
    make_plan,
)
from tests.fakes.even_words import EvenWords
from tests.fakes.letters import rules
from tests.fakes.node_data import activate, make_node
from tests.fakes.policy_rollouts import PolicyRollouts
from tests.fakes.policy_vllm import sampling_vllm
from tests.fakes.tiny_model import POSITIONS, prompt_ids, text_ids, tiny_adapter, tiny_model

TAIL = text_ids("w7 w9 w11 w13 w200 w201")
"""What a tool said: of the same tokens that the model samples."""


class Acted(PolicyRollouts):
    """Each answer is an episode: one word of the model, then what a tool said."""

    tail: Sequence[int] = TAIL
    reward: float | None = None

    def _answers(self, ask: Ask) -> list[Answer]:
        return [self._episode(ask, answer) for answer in super()._answers(ask)]

    def _episode(self, ask: Ask, answer: Answer) -> Answer:
        verdict = EvenWords().verify(Task("t", []), answer.text).score
        way = Trajectory(
            list(ask.prompt_ids),
            [*answer.token_ids, *self.tail],
            [*answer.logprobs, *[0.0] * len(self.tail)],
            [*[True] * len(answer.token_ids), *[False] * len(self.tail)],
            1,
            verdict,
        )
        return Answer(way.token_ids, way.logprobs, "", way)


def train(plan: RoundPlan, rollouts: PolicyRollouts, workspace: Path) -> TrainedRound:
    exercises = [replace(one, rules=rules()) for one in exercises_of(plan)]
    return train_grpo(
        plan,
        Workplace(tiny_model(), None, workspace),
        exercises=exercises,
        rollouts=rollouts,
        publish=rollouts.publish,
    )


def test_only_sampled_tokens_are_trained_on(tmp_path: Path) -> None:
    """A round is the same whatever stood after the last sampled token."""
    plan = make_plan(steps=4)

    class Alone(Acted):
        tail = ()

    trained = {
        kind: train(plan, kind(SAMPLES, max_tokens=1), folder_for(tmp_path, kind.__name__))
        for kind in (Alone, Acted)
    }
    assert trained[Alone].metrics["reward_first"] == trained[Acted].metrics["reward_first"]
    for name, module in trained[Alone].tensors.modules.items():
        other = trained[Acted].tensors.modules[name]
        assert np.abs(module.B).max() > 1e-3, "something is learnt"
        # Adam divides small gradients by their size, so rounding is not as small as it was.
        np.testing.assert_allclose(module.B, other.B, atol=2e-3)


def test_a_round_learns_from_the_rewards_of_episodes(tmp_path: Path) -> None:
    metrics = train(make_plan(steps=12), Acted(SAMPLES, max_tokens=1), tmp_path).metrics
    assert metrics["reward_last"] > metrics["reward_first"] + 0.2
    assert metrics["unscored"] == 0


def test_an_episode_that_nobody_can_judge_is_left_out(tmp_path: Path) -> None:
    class Failing(Acted):
        def _episode(self, ask: Ask, answer: Answer) -> Answer:
            if answer.token_ids[0] % 5 == 0:
                return Answer([], [], "")  # its environment raised
            made = super()._episode(ask, answer)
            if answer.token_ids[0] % 5 == 1:
                assert made.episode is not None
                made.episode.reward = None
            return made

    metrics = train(make_plan(steps=2), Failing(SAMPLES, max_tokens=1), tmp_path).metrics
    assert 20 < metrics["unscored"] < 90


class Node:
    def __init__(self, settings: Any, vllm: Any, gateway: Any) -> None:
        self.vllm, self.gateway = vllm, gateway
        self.control = ControlClient(control_socket(settings.data_dir))
        shapes = read_base_model(tiny_model()).module_shapes
        folder = settings.data_dir / "learning" / "policies"
        self.policies = Policies(folder, self.control, "r1", LoraTensors(), shapes)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    settings = make_node(tmp_path)
    activate(settings, LoraTensors(), version=0)
    with sampling_vllm(settings) as (vllm, gateway):
        yield Node(settings, vllm, gateway)


PLAN = GrpoPlan(
    environments=["safe"], prompts=2, samples=3, max_answer_tokens=2, temperature=1.0, beta=0.0
)


async def two_turns(sample: Sample) -> Trajectory:
    """An episode of two turns with two tokens between them."""
    way = Trajectory(list(prompt_ids("w1")))
    for number in range(2):
        turn: Turn = await sample(way.ids, 2, number)
        way.say(turn)
        if number == 0:
            way.tell(TAIL[:2])
    way.reward = 1.0
    return way


def test_the_same_policy_task_and_seed_give_the_same_episodes(node: Node) -> None:
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    asks = [Ask(prompt_ids("w1"), seed, two_turns) for seed in (3, 4)]

    def sampled() -> Any:
        rollouts = VllmRollouts(node.control, PLAN, in_flight=2, yield_above=0)
        return asyncio.run(rollouts.sample(name, asks))

    first = sampled()
    assert [len(group) for group in first] == [3, 3]
    assert first == sampled()
    seeds = [request["seed"] for request in node.vllm.requests]
    assert len(seeds) == 24
    assert len(set(seeds)) == 12, "a seed for each turn of each sample, the same ones again"
    assert {request["capture"] for request in node.vllm.requests} == {"off"}
    (answer, *_), _ = first
    assert answer.token_ids == answer.episode.token_ids
    assert not all(answer.episode.sampled)


def test_episodes_of_a_policy_that_vllm_does_not_know_are_none(node: Node) -> None:
    rollouts = VllmRollouts(node.control, PLAN, in_flight=2, yield_above=0)
    asks = [Ask(prompt_ids("w1"), 3, two_turns)]
    assert asyncio.run(rollouts.sample("policy/unknown@0", asks)) == [None]


def test_an_environment_that_raises_costs_its_episode_and_one_that_hangs_the_round(
    node: Node,
) -> None:
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    rollouts = VllmRollouts(node.control, PLAN, in_flight=2, yield_above=0)

    async def raised(sample: Sample) -> None:
        return None

    async def hung(sample: Sample) -> Trajectory:
        raise EnvironmentFault("safe", "it hung")

    (group,) = asyncio.run(rollouts.sample(name, [Ask([1], 3, raised)]))
    assert group == [Answer([], [], "")] * 3
    with pytest.raises(EnvironmentFault, match="it hung"):
        asyncio.run(rollouts.sample(name, [Ask([1], 3, hung)]))


def test_the_gate_plays_episodes_of_both(node: Node) -> None:
    policy = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    start = str(node.gateway.aliases.target)

    class Judged(Exercise):
        async def play(self, sample: Sample) -> Trajectory | None:
            way = await two_turns(sample)
            way.reward = (way.token_ids[0] % 7) / 7
            return way

    class World:
        schemas: Sequence[dict[str, Any]] = ()
        tasks = start = None

    tasks = [Judged("safe", World(), Task("t", []), [1], 0, rules())]  # type: ignore[arg-type]
    found = asyncio.run(gain.measure(node.control, tasks, start=start, policy=policy, max_tokens=2))
    assert found.tasks == 1
    assert {request["temperature"] for request in node.vllm.requests} == {0}
    assert {request["model"] for request in node.vllm.requests} == {start, policy}


def test_a_template_without_tools_makes_the_round_impossible(tmp_path: Path) -> None:
    settings = make_node(tmp_path)
    safe = {"name": "safe", "factory": "tests.fakes.safe_environment:Safe", "rollouts": True}
    settings = type(settings).model_validate(settings.model_dump() | {"environments": [safe]})
    plan = make_plan(grpo=PLAN)
    with ExitStack() as held:
        environments = _environments(PLAN, settings, held)
        assert isinstance(environments["safe"], Episodes)
        with pytest.raises(RoundImpossible, match="'safe' has rollouts and tools"):
            make_exercises(plan, environments, load_renderer(tiny_model()), POSITIONS)
        (exercise, *_) = make_exercises(plan, environments, rules().renderer, 2000)
    assert exercise.rules == Rules(exercise.rules.renderer, 8, 2, 2000)  # type: ignore[union-attr]


def test_calls_are_read_as_vllms_parser_reads_them() -> None:
    """Clients of the node meet the same calls as rollouts do."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    from edge_node.environments.tools import tool_schemas
    from edge_node.episodes import _CALL
    from tests.fakes.safe_environment import Safe

    assert Hermes2ProToolParser.tool_call_regex.pattern == _CALL.pattern
    for schema in tool_schemas(Safe()):
        dumped = ChatCompletionToolsParam.model_validate(schema).model_dump()
        assert dumped == schema, "the template gets the same tools"
