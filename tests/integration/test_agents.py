"""Agents against the real vLLM: what a session says of them is what the model did."""

from __future__ import annotations

from typing import Any

import pytest

from edge_node.agent_runs import AgentRuns
from edge_node.environments import Agents, EnvironmentProcess
from edge_node.episodes import Trajectory
from edge_node.learning.trajectories import join_turns
from edge_node.settings import EnvironmentSpec
from lorikeet.together import together
from tests.integration.serving_node import COMPLETIONS, ServingNode, serving_node

pytestmark = [pytest.mark.timeout(420), pytest.mark.slow]
SPEC = EnvironmentSpec(name="acme", factory="tests.fakes.agents:Asking")


async def run(node: ServingNode, agents: Agents, model: str) -> list[list[Trajectory]]:
    """The sequences of four runs, of which each has a reward."""
    runs = AgentRuns(node.control, SPEC, agents)
    ends = await together(
        runs.run(task, model, seed=seed, temperature=1.0, max_answer_tokens=6)
        for seed, task in enumerate(agents.tasks("train", count=4, seed=0))
    )
    assert all(0 <= (end.reward or 0.0) <= 1 for end in ends)
    return [join_turns(end.turns) for end in ends]


def tokens(found: list[Trajectory]) -> list[tuple[list[int], list[int]]]:
    """Without log-probabilities: their last digits depend on what else is in the batch."""
    return [(one.prompt_ids, one.token_ids) for one in found]


async def logprobs(node: ServingNode, model: str, prompt: list[int], token: int) -> float:
    """What vLLM says of `token` after `prompt` now: it is among all of the tiny vocabulary."""
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, "logprobs": 0,
        "allowed_token_ids": [token], "return_token_ids": True,
    }  # fmt: skip
    answer = await node.http.post(COMPLETIONS, json=body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["token_ids"] == [token]
    return float(choice["logprobs"]["token_logprobs"][0])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sessions_tokens_and_log_probabilities_are_the_models(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = SPEC.model_copy(update={"options": {"stream": stream}})
    # In 16 bits the tiny model's log-probabilities are off by up to 1.3.
    async with serving_node({1: 4, 2: 4}, dtype="float32") as node:
        with EnvironmentProcess(spec) as process:
            agents = process.environment()
            assert isinstance(agents, Agents)
            first, second = node.versions
            results = await run(node, agents, first)
            assert len(results) == 4
            again = await run(node, agents, first)
            assert list(map(tokens, again)) == list(map(tokens, results)), "the same seeds"
            others = await run(node, agents, second)
            assert list(map(tokens, others)) != list(map(tokens, results)), "another version"
        assert (await node.control.state()).captured == 0
        for result in results:
            for one in result:
                assert len(one.token_ids) == len(one.sampled) == len(one.logprobs)
                sampled = [at for at, mask in enumerate(one.sampled) if mask]
                assert 1 <= len(sampled) <= 12
                for at in sampled[:2] + sampled[-2:]:
                    context = one.prompt_ids + one.token_ids[:at]
                    known = await logprobs(node, first, context, one.token_ids[at])
                    assert one.logprobs[at] == pytest.approx(known, abs=1e-3)
