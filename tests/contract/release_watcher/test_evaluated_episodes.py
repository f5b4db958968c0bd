"""An environment with tools in an evaluation: both releases play the same episodes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from edge_node.errors import EnvironmentFault
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.settings import EnvironmentSpec
from tests.contract.release_watcher.endpoint import GREEDY, _running, counts
from tests.fakes.endpoint import at
from tests.fakes.episodes_here import Here
from tests.fakes.letters import END, Letters, call, ids, rules


@asynccontextmanager
async def playing() -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """`new` looks the code up and types it; `old` does so for every third safe."""
    requests: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        assert request.headers["x-lorikeet-capture"] == "off"
        requests.append(body)
        text = Letters().decode(body["prompt"])
        found = re.search(r"open safe (\d+)!", text)
        assert found
        said = _say(body["model"], int(found[1]), text)
        tokens = [*ids(said), END][: body["max_tokens"]]
        choice = {
            "token_ids": tokens,
            "logprobs": {"token_logprobs": [0.0] * len(tokens)},
            "finish_reason": "stop",
        }
        return web.json_response({"model": body["model"], "choices": [choice]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    async with _running(app) as url:
        yield url, requests


def _say(model: str, safe: int, text: str) -> str:
    if model == "old" and safe % 3:
        return "no"
    if told := re.search(r"<t>(\{.*?\})", text):
        return "yes" if "<t>open" in text else call("type_code", **json.loads(told[1]))
    return call("look_up", safe=safe)


def evaluator(url: str, how: str = "", **bounds: Any) -> Evaluator:
    spec = EnvironmentSpec(name="safe", factory="x:Y")
    return Evaluator(
        at(url), {"safe": (spec, lambda: Here(how))}, seed=0, rules=lambda: rules(**bounds)
    )


async def test_an_episode_passes_when_its_reward_is_whole() -> None:
    async with playing() as (url, requests):
        result = await evaluator(url).compare("safe", "new", "old", 0, 30, GREEDY)
        assert counts(result) == (10, 0, 20, 0)
        assert len(requests) == 30 * 3 + 10 * 3 + 20
        assert {body["temperature"] for body in requests} == {0}
        assert {body["max_tokens"] for body in requests} == {100}
        further = await evaluator(url).compare("safe", "new", "old", 30, 30, GREEDY)
        assert sum(counts(further)) == 20


async def test_attempts_at_episodes_share_their_seeds() -> None:
    async with playing() as (url, requests):
        result = await evaluator(url).compare("safe", "new", "old", 0, 3, Sampling(2, 0.8))
    assert counts(result) == counts(result.every_attempt) == (1, 0, 2, 0)
    asked = {
        model: {(str(body["prompt"]), body["seed"]) for body in requests if body["model"] == model}
        for model in ("new", "old")
    }
    assert asked["old"] < asked["new"]
    assert len(asked["new"]) == 3 * 2 * 3
    assert {body["temperature"] for body in requests} == {0.8}


async def test_an_episode_without_a_reward_costs_the_result_and_is_no_loss() -> None:
    async with playing() as (url, _):
        with pytest.raises(EnvironmentFault, match="'safe' gave no reward for a held-out task"):
            await evaluator(url, "none").compare("safe", "new", "old", 0, 3, GREEDY)


async def test_a_template_without_tools_is_the_environments_fault() -> None:
    async with playing() as (url, requests):
        asking = evaluator(url, hermes=False)
        with pytest.raises(EnvironmentFault, match=r"'safe' has tools.*template does not show"):
            await asking.compare("safe", "new", "old", 0, 3, GREEDY)
    assert not requests
