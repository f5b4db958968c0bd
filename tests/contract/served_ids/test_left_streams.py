"""A client that leaves in the middle of a stream, through a real port and vLLM's real app."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn

from edge_node.experience.usable import ABORTED
from edge_node.serving import gateway as gateways
from examples.ports import free_port
from tests.contract.served_ids.running import CHAT, Running

pytestmark = pytest.mark.timeout(240)
SAID = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}
ASKED = {
    CHAT: SAID,
    "/v1/messages": {"model": "lorikeet", **SAID},
    "/v1/responses": {"input": "hi", "max_output_tokens": 60},
}


def id_and_text(parts: list[dict[str, Any]]) -> tuple[str, str]:
    """Of the first events of a stream of any of these routes."""
    first, text = parts[0], ""
    for part in parts:
        delta = part["choices"][0]["delta"] if "choices" in part else part.get("delta") or ""
        text += delta if isinstance(delta, str) else delta.get("content") or delta.get("text") or ""
    return (first.get("message") or first.get("response") or first)["id"], text


class Port:
    """The app of `running` at a port of its own."""

    def __init__(self, running: Running) -> None:
        transport: Any = running.server.http._transport
        port = free_port()
        config = uvicorn.Config(transport.app, port=port, log_level="warning", lifespan="off")
        self.address, self._running = f"http://127.0.0.1:{port}", running
        self._server = uvicorn.Server(config)
        gateways.here = running.server.gateway
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), running._loop)
        while not self._server.started:
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        self._serving.result(20)


@pytest.mark.parametrize("path", ASKED)
def test_a_left_stream_is_kept_and_says_why_it_is_not_learnt(
    qwen: Running, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gateway = qwen.server.engine, qwen.server.gateway
    monkeypatch.setattr(engine, "answer", qwen.renderer.answer_ids("a long answer " * 4))
    generate = gateway.engine._client.generate

    async def slowly(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for output in generate(*args, **kwargs):
            yield output
            await asyncio.sleep(0.02)

    monkeypatch.setattr(gateway.engine._client, "generate", slowly)
    before, port = gateway.recorder.counts(), Port(qwen)
    try:
        with (
            httpx.Client(base_url=port.address, timeout=30) as client,
            client.stream("POST", path, json=ASKED[path] | {"stream": True}) as response,
        ):
            events = (line[6:] for line in response.iter_lines() if line.startswith("data: "))
            parts = [json.loads(next(events)) for _ in range(9)]
        (answer_id, read), ends = id_and_text(parts), time.monotonic() + 20
        while (kept := gateway.store.interaction(answer_id)) is None:
            assert time.monotonic() < ends, "it is kept"
            time.sleep(0.05)
        told = qwen.post("/v1/feedback", {"id": answer_id, "score": 1}).json()
    finally:
        port.close()
    assert kept.answer.startswith(read)
    assert read.startswith("a l")
    assert len(kept.answer) < len("a long answer " * 4)
    assert (kept.finish_reason, kept.unusable) == ("abort", ABORTED)
    assert (told["usable"], told["reason"]) == (False, ABORTED)
    after = gateway.recorder.counts()
    assert (after.captured, after.lost) == (before.captured + 1, before.lost)
