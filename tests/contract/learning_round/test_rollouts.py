"""Rollouts, policies and the local gate over the real control socket; nothing is trained."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_node.errors import ServingError
from edge_node.learning import gain, rollouts
from edge_node.learning.plans import GrpoPlan
from edge_node.learning.policies import Policies, sweep
from edge_node.learning.records import RoundImpossible
from edge_node.learning.rewards import Exercise
from edge_node.learning.rollouts import Ask, VllmRollouts
from edge_node.serving import ControlClient, control_socket
from edge_node.serving.gateway import Gateway
from edge_node.settings import EdgeSettings
from protos.base import read_base_model
from protos.lora import LoraTensors
from tests.fakes.even_words import EvenWords
from tests.fakes.node_data import activate, make_node
from tests.fakes.policy_vllm import SamplingVllm, policies_on_disk, sampling_vllm
from tests.fakes.tiny_model import prompt_ids, tiny_adapter, tiny_model

PLAN = GrpoPlan(
    environments=["even"], prompts=3, samples=4, max_answer_tokens=2, temperature=1.0, beta=0.0
)
ASKS = [Ask(prompt_ids(f"w{number}"), seed=number) for number in range(6)]


class Node:
    def __init__(self, settings: EdgeSettings, vllm: SamplingVllm, gateway: Gateway) -> None:
        self.vllm, self.gateway, self.settings = vllm, gateway, settings
        self.control = ControlClient(control_socket(settings.data_dir))
        self.folder = settings.data_dir / "learning" / "policies"
        shapes = read_base_model(tiny_model()).module_shapes
        self.policies = Policies(self.folder, self.control, "r1", LoraTensors(), shapes)

    def rollouts(self, **options: Any) -> VllmRollouts:
        return VllmRollouts(self.control, PLAN, **{"in_flight": 2, "yield_above": 0} | options)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    settings = make_node(tmp_path)
    activate(settings, LoraTensors(), version=0)
    with sampling_vllm(settings) as (vllm, gateway):
        yield Node(settings, vllm, gateway)


def test_the_same_policy_prompt_and_seed_give_the_same_answers(node: Node) -> None:
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    first = asyncio.run(node.rollouts().sample(name, ASKS))
    assert [group and len(group) for group in first] == [4] * 6
    for group in first:
        assert group is not None
        assert all(len(one.token_ids) == len(one.logprobs) <= 2 for one in group)
    assert first == asyncio.run(node.rollouts().sample(name, ASKS))
    other = asyncio.run(node.policies.publish(1, tiny_adapter(2)))
    assert other != name
    assert asyncio.run(node.rollouts().sample(other, ASKS)) != first
    assert {request["capture"] for request in node.vllm.requests} == {"off"}
    assert {request["n"] for request in node.vllm.requests} == {4}


def test_a_failed_request_is_none(node: Node) -> None:
    assert asyncio.run(node.rollouts().sample("policy/unknown@0", ASKS[:2])) == [None, None]


def test_clients_do_not_see_a_policy(node: Node) -> None:
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    assert name.startswith("policy/r1.")
    assert name in node.gateway.aliases.loaded
    assert name not in node.gateway.aliases.public
    with pytest.raises(ServingError, match="is not loaded"):
        asyncio.run(node.control.point(name))


def test_one_policy_is_loaded_at_a_time_and_no_directory_outlives_it(node: Node) -> None:
    for step in range(3):
        name = asyncio.run(node.policies.publish(step, tiny_adapter(step)))
        assert asyncio.run(node.policies.publish(step, tiny_adapter(step))) == name
    loaded = asyncio.run(node.control.state()).loaded
    assert [one for one in loaded if one.startswith("policy/")] == [name]
    assert [path.name for path in node.folder.glob("*/*")] == ["2"]
    asyncio.run(sweep(node.folder, node.control))
    assert len(asyncio.run(node.control.state()).loaded) == 1
    assert not policies_on_disk(node.settings)


def test_users_go_first(node: Node) -> None:
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    release = str(node.gateway.aliases.target)
    beats: list[float] = []
    node.gateway.aliases.enter(release)
    threading.Timer(1.2, lambda: node.gateway.aliases.leave(release)).start()
    began = time.monotonic()
    assert None not in asyncio.run(node.rollouts(beat=lambda: beats.append(0)).sample(name, ASKS))
    assert time.monotonic() - began >= 1.2
    assert len(beats) > 6, "a learner that waits is alive"
    # One user's request is not too many here, and the learner's own do not count.
    node.gateway.aliases.enter(release)
    node.gateway.aliases.enter(name)
    assert None not in asyncio.run(node.rollouts(yield_above=1).sample(name, ASKS[:1]))


def test_rollouts_wait_for_users_streams_but_not_for_ever(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "LOOK_S", 0.02)
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    monkeypatch.setattr(node.gateway.first_tokens, "longest_s", lambda: 2.0)

    def waited_s(limit_s: float) -> float:
        limits = {"yield_first_token_s": limit_s, "yield_at_most_s": 0.4}
        began = time.monotonic()
        assert None not in asyncio.run(node.rollouts(**limits).sample(name, ASKS[:1]))
        return time.monotonic() - began

    waited_s(3.0)  # the sampler is warm after it
    assert waited_s(1.9) >= 0.4
    node.gateway.aliases.enter(str(node.gateway.aliases.target))
    assert waited_s(9.0) >= 0.4, "the number of requests has the same bound"


def test_a_learner_that_waits_for_one_long_answer_is_alive(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts, "BEAT_S", 0.01)
    name = asyncio.run(node.policies.publish(0, tiny_adapter(1)))
    beats: list[int] = []
    at_answer: list[int] = []
    heard = node.vllm._heard

    async def slowly(request: Any) -> Any:
        for _ in range(100):
            if len(beats) < 5:
                await asyncio.sleep(0.05)
        at_answer.append(len(beats))
        return await heard(request)

    monkeypatch.setattr(node.vllm, "_heard", slowly)
    sampled = node.rollouts(beat=lambda: beats.append(0)).sample(name, ASKS[:1])
    assert None not in asyncio.run(sampled)
    assert at_answer[0] >= 5


def test_the_gate_compares_both_on_the_same_tasks(node: Node) -> None:
    start = str(node.gateway.aliases.target)
    policy = asyncio.run(node.policies.publish(0, tiny_adapter(1)))

    def measure(environment: EvenWords, *, start: str = start) -> gain.Gain:
        tasks = [
            Exercise("even", environment, task, [], 0)
            for task in environment.tasks("held_out", count=32, seed=1)
        ]
        return asyncio.run(
            gain.measure(node.control, tasks, start=start, policy=policy, max_tokens=2)
        )

    found = measure(EvenWords())
    assert found.tasks == 32
    asked = [
        sorted(str(one["messages"]) for one in node.vllm.requests if one["model"] == model)
        for model in (start, policy)
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 32
    assert {request["temperature"] for request in node.vllm.requests} == {0}
    assert found.policy - found.start == pytest.approx((found.better - found.worse) / 32)
    same = measure(EvenWords(), start=policy)
    assert (same.better, same.worse, same.is_one) == (0, 0, False)
    assert 0 < measure(EvenWords(faulty="01234")).tasks < 32, "a fault of the verifier is no mark"
    with pytest.raises(RoundImpossible, match="No answer to 32 held-out tasks got a score"):
        measure(EvenWords(faulty="0123456789"))
    with pytest.raises(ServingError, match="to an evaluation request for lorikeet@none, task"):
        measure(EvenWords(), start="lorikeet@none")


def test_vllm_takes_the_requests_of_rollouts() -> None:
    """vLLM's own reading of what VllmRollouts sends, and its answer's fields."""
    from vllm.entrypoints.openai.completion import protocol

    body = VllmRollouts(ControlClient(Path("x")), PLAN, in_flight=1, yield_above=0).body(
        "policy/r1@0", ASKS[3]
    )
    request = protocol.CompletionRequest.model_validate(body)
    assert not request.model_extra
    params = request.to_sampling_params(2, {})
    assert (params.n, params.seed, params.temperature, params.logprobs) == (4, 3, 1.0, 0)
    assert request.return_token_ids
    fields = protocol.CompletionResponseChoice.model_fields
    assert {"index", "text", "token_ids", "logprobs"} <= fields.keys()
    assert "token_logprobs" in protocol.CompletionLogProbs.model_fields
