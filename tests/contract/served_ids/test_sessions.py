"""A session keeps what vLLM's own API server gave to the engine and got from it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from edge_node.serving import ControlClient
from tests.contract.served_ids.running import HISTORY, WEATHER, Running, served
from tests.fakes.vllm_server import VERSION

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/chat/completions", {"messages": HISTORY, "tools": [WEATHER], "temperature": 0.2}),
    ("/chat/completions", {"messages": HISTORY[:1], "stream": True, "max_tokens": 2}),
    ("/chat/completions", {"messages": HISTORY[:1], "logprobs": True, "top_logprobs": 0}),
    ("/completions", {"prompt": "Rain?", "top_p": 0.5, "seed": 3}),
    ("/completions", {"prompt": [5, 6, 7], "stream": True, "max_tokens": 500}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_turn_has_the_ids_that_vllm_names(qwen: Running, path: str, body: dict[str, Any]) -> None:
    control = ControlClient(qwen.data_dir / "control.sock")

    async def ask() -> tuple[httpx.Response, Any]:
        session = await control.open_session(
            VERSION, seed=1, temperature=0.9, max_answer_tokens=3, lasts_s=60
        )
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            answer = await client.post(
                session.base_url + path,
                json=body | {"model": session.model, "return_token_ids": True},
                headers={"authorization": f"Bearer {session.api_key}"},
            )
        return answer, await control.take_session(session.api_key)

    response, (turn,) = qwen.wait(ask())
    assert response.status_code == 200, response.text
    answer_id, prompt, answer = served(response)
    assert (turn.prompt_ids, turn.answer_ids, turn.text_only) == (prompt, answer, True)
    assert turn.logprobs == [-token / 64 for token in answer]
    assert len(answer) == min(3, body.get("max_tokens", 3))
    asked = qwen.server.engine.asked[-1]
    assert (asked.temperature, asked.top_p, asked.top_k, asked.n) == (0.9, 1.0, 0, 1)
    assert asked.seed not in (None, 3)
    assert ("logprobs" in body) == ('"logprobs":{' in response.text), "as the client asked"
    assert qwen.server.gateway.store.interaction(answer_id) is None
