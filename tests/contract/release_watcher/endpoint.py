"""A stand-in for vLLM's endpoint that answers tasks, and finds texts as likely, as a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from edge_node.releases.evaluation import Sampling
from edge_node.settings import EnvironmentSpec
from tests.fakes.word_environment import NextWord

Answer = Callable[[str, int, dict[str, Any]], bool]
"""(model, number of the word, request) -> whether the answer is right."""


Likelihood = Callable[[str, str], float]
"""(model, token) -> its log-probability."""
GREEDY = Sampling()
MAX_MODEL_LEN = 9


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """URL of an endpoint that answers `w7` with `w8` or wrongly, and the requests it got."""
    requests: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        assert request.headers["x-lorikeet-capture"] == "off"
        requests.append(body)
        number = int(body["messages"][0]["content"][1:])
        right = answer(body["model"], number, body)
        message = {"role": "assistant", "content": f"w{number + 1}" if right else "wrong"}
        return web.json_response({"model": body["model"], "choices": [{"message": message}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    async with _running(app) as url:
        yield url, requests


@asynccontextmanager
async def reading(likelihood: Likelihood) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """URL of an endpoint that knows each word of a text as a token, and the requests it got."""
    requests: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        assert request.headers["x-lorikeet-capture"] == "off"
        requests.append(body)
        tokens = body["prompt"].split()[: body["truncate_prompt_tokens"]]
        values = [likelihood(body["model"], token) for token in tokens[1:]]
        found = [None, *({"7": {"logprob": value, "rank": 1}} for value in values)]
        return web.json_response({"model": body["model"], "choices": [{"prompt_logprobs": found}]})

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "max_model_len": MAX_MODEL_LEN}]})

    app = web.Application()
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/v1/models", models)
    async with _running(app) as url:
        yield url, requests


@asynccontextmanager
async def _running(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def words(last: int = 100, name: str = "words", anchor: bool = False) -> dict[str, Any]:
    """`last // 2` held-out tasks."""
    spec = EnvironmentSpec(name=name, factory="x:Y", anchor=anchor)
    return {name: (spec, lambda: NextWord(0, last))}


def counts(result: Any) -> tuple[int, int, int, int]:
    return (
        result.both_passed,
        result.only_reference_passed,
        result.only_candidate_passed,
        result.neither_passed,
    )


def asked(requests: list[dict[str, Any]], model: str) -> list[str]:
    return [body["messages"][0]["content"] for body in requests if body["model"] == model]
