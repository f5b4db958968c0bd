"""A node's vLLM behind its real control socket and middleware, but for the engine: a tiny sampler.

In: a node's settings. Out: a running control socket in a thread of its own; what was loaded and
unloaded, and every request that reached the engine.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from edge_node.capture import SERVED, Generation
from edge_node.learning.policies import read_release
from edge_node.serving import control_socket
from edge_node.serving.control import ControlServer
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.session_port import SessionPort
from edge_node.settings import EdgeSettings
from tests.fakes.gateway import RecordingEngine
from tests.fakes.tiny_sampler import END, TinySampler


class SamplingVllm(RecordingEngine):
    """Engine and app in one; one request at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._sampler = TinySampler()
        self._used: Path | None = None
        self.requests: list[dict[str, Any]] = []
        self.unloaded: list[str] = []
        self.refuses = False
        """Every chat request gets a 400."""
        self.app = FastAPI()
        self.app.add_api_route("/v1/completions", self._completions, methods=["POST"])
        self.app.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])

    async def unload(self, name: str) -> None:
        assert (self.loaded[name] / "adapter_model.safetensors").is_file()
        self.unloaded.append(name)
        await super().unload(name)

    async def _completions(self, request: Request) -> JSONResponse:
        body = await self._heard(request)
        answers = self._sampler.answers(
            body["prompt"], samples=body["n"], seed=body["seed"], max_tokens=body["max_tokens"],
            greedy=False,
        )  # fmt: skip
        choices = [
            {
                "index": index, "text": answer.text, "token_ids": answer.token_ids,
                "logprobs": {"token_logprobs": answer.logprobs},
                "finish_reason": "stop" if answer.token_ids[-1] == END else "length",
            }
            for index, answer in enumerate(answers)
        ]  # fmt: skip
        return JSONResponse({"model": body["model"], "choices": choices[::-1]})

    async def _chat(self, request: Request) -> JSONResponse:
        body = await self._heard(request)
        ids = self._sampler.prompt_ids(body["messages"])
        if self.refuses:
            return JSONResponse({"error": "too long"}, 400)
        (answer,) = self._sampler.answers(
            ids, samples=1, seed=body.get("seed", 0), max_tokens=body.get("max_tokens") or 1,
            greedy=body["temperature"] == 0,
        )  # fmt: skip
        if (served := SERVED.get()) is not None:  # of a session
            served.generations.append(
                Generation(True, ids, answer.token_ids, logprobs=answer.logprobs, finished=True)
            )
        message = {"role": "assistant", "content": answer.text}
        return JSONResponse({"model": body["model"], "choices": [{"message": message}]})

    def hears(self, request: dict[str, Any]) -> None:
        self.requests.append(request)

    async def _heard(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(await request.body())
        self.hears(body | {"capture": request.headers.get("x-lorikeet-capture")})
        folder = self.loaded[body["model"]]
        if folder != self._used:  # it is immutable
            self._sampler.use(read_release(folder))
            self._used = folder
        return body


@contextmanager
def sampling_vllm(settings: EdgeSettings) -> Iterator[tuple[SamplingVllm, Gateway]]:
    engine, loop = SamplingVllm(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Gateway, ControlServer]:
        gateway = Gateway(settings, engine)
        inside = LorikeetMiddleware(engine.app, gateway, of_the_node=True)
        sessions = SessionPort(gateway, engine.app)
        server = ControlServer(gateway, control_socket(settings.data_dir), inside, sessions)
        await gateway.activate()
        await server.start()
        return gateway, server

    gateway, server = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
    try:
        yield engine, gateway
    finally:
        asyncio.run_coroutine_threadsafe(server.aclose(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


def policies_on_disk(settings: EdgeSettings) -> list[Path]:
    return list((settings.data_dir / "learning" / "policies").glob("*"))
