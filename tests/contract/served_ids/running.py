"""vLLM's own API server over an engine that only counts; what it served is what is trained on."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edge_node.learning.batches import IGNORED, Lesson, token_row
from edge_node.rendering import ChatFormat, load_renderer
from edge_node.serving import gateway as gateways
from tests.fakes.chat_templates import make_base
from tests.fakes.vllm_server import Server, api_server

T = TypeVar("T")


CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"at": "Oslo"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "wet"},
]


class Running:
    """One server on an event loop of its own, so that a plain test can ask it many times."""

    def __init__(self, style: str, *extra_args: str) -> None:
        self._stack, self._folder = AsyncExitStack(), tempfile.TemporaryDirectory(prefix="lk-")
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.base = make_base(Path(self._folder.name) / "base", style)
        self.data_dir = Path(self._folder.name) / "data"
        start = self._stack.enter_async_context(api_server(self.base, self.data_dir, *extra_args))
        self.server: Server = self.wait(start)
        self.renderer = load_renderer(self.base, ChatFormat.read(self.data_dir))
        self.statuses: list[int] = []

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        gateways.here = (
            self.server.gateway
        )  # one of the process: other servers of this file run as well
        response = self.wait(self.server.http.post(path, json=body, headers=headers))
        self.statuses.append(response.status_code)
        return response

    def close(self) -> None:
        self.wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._folder.cleanup()


def start(request: pytest.FixtureRequest, style: str, *extra_args: str) -> Running:
    started = Running(style, *extra_args)
    request.addfinalizer(started.close)
    return started


def served(response: Any) -> tuple[str, list[int], list[int]]:
    """Id, prompt ids and the first choice's answer ids, as vLLM returns them."""
    if response.headers["content-type"].startswith("application/json"):
        parts = [response.json()]
    else:
        lines = response.text.splitlines()
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    prompt: list[int] | None = None
    answer: list[int] = []
    for part in parts:
        prompt = part.get("prompt_token_ids") or prompt
        for choice in part["choices"]:
            prompt = prompt or choice.get("prompt_token_ids")
            if choice["index"] == 0:
                answer += choice.get("token_ids") or []
    assert prompt is not None
    return parts[0]["id"], prompt, answer


def trained(running: Running, feedback_id: str) -> Any:
    """The row that a round makes of this feedback; None when it is no example."""
    store = running.server.gateway.store
    found = [
        e
        for e in store.examples(up_to=store.cursor(), limit=10_000)
        if e.feedback_id == feedback_id
    ]
    return token_row(Lesson(found[0].prompt_ids, found[0].target_ids)) if found else None


def check(running: Running, path: str, body: dict[str, Any], correction: str | None) -> bool:
    """Ask, judge, and compare; False when vLLM refused the request."""
    response = running.post(path, {"max_tokens": 3, **body, "return_token_ids": True})
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        return False
    if 'data: {"error"' in response.text:  # vLLM fails on `echo` of parts in the middle of a stream
        return False
    answer_id, prompt, answer = served(response)
    verdict = {"score": 1} if correction is None else {"correction": correction}
    told = running.post("/v1/feedback", {"id": answer_id, **verdict}).json()
    assert told["usable"], told
    target = answer if correction is None else running.renderer.answer_ids(correction)
    row = trained(running, told["id"])
    assert row.input_ids == prompt + target
    assert row.labels == [IGNORED] * len(prompt) + target
    return True
