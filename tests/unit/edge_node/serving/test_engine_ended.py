"""An engine that ended, or a node that stops, is a 503 that a client may send again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.serving import loading
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware, Message
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.routes import App, Client

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"
CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    for name in (V1, V2):
        await gateway.load(name, make_version(tmp_path, name))
    gateway.point(V1)
    return gateway


def end(gateway: Gateway) -> None:
    gateway.engine.errored = True  # type: ignore[misc]


async def test_an_engine_that_ended_takes_no_new_request(gateway: Gateway) -> None:
    end(gateway)
    app = App()
    client = Client(app, gateway)
    answer = await client.request(CHAT, QUESTION)
    assert (client.status, client.headers[b"retry-after"], app.requests) == (503, b"5", [])
    assert "engine has ended" in answer["error"]["message"]


@pytest.mark.parametrize("status", [500, 400])
async def test_what_an_engines_end_breaks_may_be_sent_again(gateway: Gateway, status: int) -> None:
    app = App(status=status)

    async def ends() -> None:
        end(gateway)

    app.during = ends
    client = Client(app, gateway)
    await client.request(CHAT, QUESTION)
    assert client.status == (503 if status == 500 else 400)
    assert (b"retry-after" in client.headers) == (status == 500)
    assert gateway.versions.counts()[V1]["errors"] == (status == 500)


async def test_a_500_of_a_healthy_engine_stays_one(gateway: Gateway) -> None:
    client = Client(App(status=500), gateway)
    await client.request(CHAT, QUESTION)
    assert (client.status, b"retry-after" in client.headers) == (500, False)


async def test_a_stream_that_the_end_breaks_before_its_first_piece_too(gateway: Gateway) -> None:
    error = {"error": {"message": "EngineCore died", "code": 500}}

    async def app(scope: Message, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        end(gateway)
        await send(
            {"type": "http.response.body", "body": f"data: {json.dumps(error)}\n\n".encode()}
        )

    client = Client(app, gateway)  # type: ignore[arg-type]
    await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, client.headers[b"retry-after"]) == (503, b"5")
    assert gateway.versions.counts()[V1] == {
        "requests": 1,
        "errors": 1,
        "seconds": pytest.approx(0, abs=1),
    }


async def test_a_request_whose_body_came_while_the_node_stops_is_refused(gateway: Gateway) -> None:
    """Otherwise it would reach an engine that is being stopped, after the last answer was out."""
    app, sent = App(), []

    async def receive() -> Message:
        gateway.draining = True
        return {"type": "http.request", "body": json.dumps(QUESTION).encode(), "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    await LorikeetMiddleware(app, gateway)(scope, receive, send)
    assert (sent[0]["status"], app.requests) == (503, [])


async def test_the_key_of_a_request_chooses_its_version(gateway: Gateway) -> None:
    gateway.aliases.point_canary(V2)
    gateway.versions._share = 1
    client = Client(App(), gateway)
    assert (await client.request(CHAT, QUESTION))["model"] == V2
    assert client.headers[b"x-lorikeet-model"] == V2.encode()
    named = Client(App(), gateway)
    assert (await named.request(CHAT, QUESTION | {"model": V1}))["model"] == V1


async def test_a_load_that_ends_the_engine_is_noted_for_the_supervisor(
    gateway: Gateway, tmp_path: Path
) -> None:
    seen: list[str | None] = []

    async def load(name: str, path: Path) -> None:
        seen.append(loading.read_loading(tmp_path))
        if name == "lorikeet@v4":
            end(gateway)
            raise RuntimeError("EngineCore died")

    gateway.engine.load = load  # type: ignore[method-assign]
    await gateway.load("lorikeet@v3", make_version(tmp_path, "v3"))
    assert loading.read_loading(tmp_path) is None
    with pytest.raises(RuntimeError):
        await gateway.load("lorikeet@v4", make_version(tmp_path, "v4"))
    assert loading.read_loading(tmp_path) == "lorikeet@v4"
    assert seen == ["lorikeet@v3", "lorikeet@v4"]
    loading.forget_loading(tmp_path)
    assert loading.read_loading(tmp_path) is None
    loading.note_loading(tmp_path / "absent", "x")
