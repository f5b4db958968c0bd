"""Sessions over real sockets: an agent's requests in, its turns out, once, and nothing kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from edge_node.capture import SERVED, Generation, Served
from edge_node.errors import ServingError
from edge_node.serving import ControlClient, SessionAccess, Turn
from edge_node.serving.control import ControlServer
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.recording import recorded
from edge_node.serving.session_port import SessionPort
from tests.fakes.gateway import make_gateway, make_version

V1, POLICY = "lorikeet@v1-aaaaaaaa", "policy/r1@3"
CHAT, TEXT = "/chat/completions", "/completions"
LIMITS: dict[str, Any] = {
    "seed": 7, "temperature": 0.7, "max_answer_tokens": 20, "lasts_s": 60.0
}  # fmt: skip


class Vllm:
    """Answers with what it was asked; its engine makes one token."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.app = FastAPI()
        for path in (CHAT, TEXT):
            self.app.add_api_route(f"/v1{path}", self.complete, methods=["POST"])

    async def complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.bodies.append(body)
        if (served := SERVED.get()) is not None:
            number = len(served.generations)
            served.generations.append(
                Generation(True, [number], [9], logprobs=[-0.5], finished=True)
            )
        choices = [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]
        return JSONResponse({"id": "chatcmpl-1", "model": body["model"], "choices": choices})


@pytest.fixture
def vllm() -> Vllm:
    return Vllm()


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    for name in (V1, POLICY):
        await gateway.load(name, make_version(tmp_path, name))
    gateway.point(V1)
    return gateway


@pytest.fixture
async def control(gateway: Gateway, vllm: Vllm, tmp_path: Path) -> AsyncIterator[ControlClient]:
    path = tmp_path / "control.sock"
    requests = LorikeetMiddleware(vllm.app, gateway, of_the_node=True)
    server = ControlServer(gateway, path, requests, SessionPort(gateway, vllm.app))
    await server.start()
    yield ControlClient(path)
    await server.aclose()


async def ask(session: SessionAccess, path: str = CHAT, **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.post(
            session.base_url + path,
            json={"messages": [{"role": "user", "content": "hi"}]} | body,
            headers={"authorization": f"Bearer {session.api_key}"},
        )


async def test_the_turns_of_a_session_are_read_once_and_kept_nowhere(
    control: ControlClient, gateway: Gateway, vllm: Vllm
) -> None:
    session = await control.open_session(POLICY, **LIMITS)
    other = await control.open_session(V1, **LIMITS)
    assert session.base_url.startswith("http://127.0.0.1:")
    for asked in ({}, {"model": POLICY, "temperature": 0}):
        answer = await ask(session, **asked)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == POLICY
    assert (await ask(other)).json()["model"] == V1
    assert [body["temperature"] for body in vllm.bodies] == [0.7] * 3
    assert vllm.bodies[0]["seed"] != vllm.bodies[1]["seed"]
    assert vllm.bodies[0]["seed"] == vllm.bodies[2]["seed"]
    assert await control.take_session(session.api_key) == [
        Turn([0], [9], [-0.5]),
        Turn([1], [9], [-0.5]),
    ]
    with pytest.raises(ServingError, match="This session is not open"):
        await control.take_session(session.api_key)
    assert len(await control.take_session(other.api_key)) == 1
    assert gateway.store.interaction("chatcmpl-1") is None
    assert not gateway.aliases.in_flight


async def test_a_client_still_is_captured_beside_a_session(
    control: ControlClient, gateway: Gateway, vllm: Vllm
) -> None:
    await control.open_session(POLICY, **LIMITS)
    async with control.requests(1) as client:
        await client.post("/v1/chat/completions", json={"messages": [], "model": V1})
    assert gateway.store.interaction("chatcmpl-1") is not None


async def test_without_the_key_of_an_open_session_nothing_is_answered(
    control: ControlClient, vllm: Vllm
) -> None:
    session = await control.open_session(POLICY, **LIMITS)
    for key in ("wrong", session.api_key + "x"):
        stranger = SessionAccess(session.base_url, key, POLICY)
        refused = await ask(stranger)
        assert refused.status_code == 401
        assert "No open session has this API key" in refused.json()["error"]["message"]
    await control.take_session(session.api_key)
    assert (await ask(session)).status_code == 401
    assert not vllm.bodies


async def test_a_session_ends_by_itself(control: ControlClient) -> None:
    session = await control.open_session(POLICY, **LIMITS | {"lasts_s": 0.05})
    await asyncio.sleep(0.2)
    assert (await ask(session)).status_code == 401


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        (CHAT, {"n": 3}, 400, "n is 3; expected 1 in a session"),
        (CHAT, {"model": "lorikeet"}, 400, "model is 'lorikeet'; expected 'policy/r1@3'"),
        ("/models", {}, 404, "Routes of a session: /v1/chat/completions, /v1/completions"),
    ],
)
async def test_what_a_session_refuses_is_said(
    control: ControlClient, path: str, body: dict[str, Any], status: int, expected: str
) -> None:
    session = await control.open_session(POLICY, **LIMITS)
    refused = await ask(session, path, **body)
    assert refused.status_code == status
    assert expected in refused.json()["error"]["message"]


@pytest.mark.parametrize("model", ["lorikeet", "policy/r1@4"])
async def test_a_session_is_of_a_loaded_version(control: ControlClient, model: str) -> None:
    with pytest.raises(ServingError, match=f"{model} is not loaded"):
        await control.open_session(model, **LIMITS)


def output(tokens: list[int], reason: str | None) -> Any:
    places = [{token: SimpleNamespace(logprob=-float(token)), 99: None} for token in tokens]
    choice = SimpleNamespace(index=0, token_ids=tokens, logprobs=places, finish_reason=reason)
    return SimpleNamespace(prompt_token_ids=[1, 2], outputs=[choice])


@pytest.mark.parametrize(
    ("delta", "outputs"),
    [
        (True, [output([3], None), output([4], "stop")]),
        (False, [output([3], None), output([3, 4], "stop")]),
    ],
)
async def test_the_engine_leaves_log_probabilities_in_a_session(
    delta: bool, outputs: list[Any]
) -> None:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    async def generate(prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        assert sampling_params.logprobs == 0
        for one in outputs:
            yield one

    served = Served(wants_logprobs=True)
    before = SERVED.set(served)
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.FINAL_ONLY
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    parameters = SamplingParams(output_kind=kind)
    async for _ in recorded(generate)(prompt, parameters, "r"):  # type: ignore[arg-type]
        pass
    SERVED.reset(before)
    (found,) = served.generations
    assert (list(found.prompt_ids), found.answer_ids, found.logprobs) == ([1, 2], [3, 4], [-3, -4])
    assert found.finished
