"""Where routes, keys, canaries, counts and an engine's end meet in one request."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Key, Scope
from edge_node.serving.asgi import Message
from edge_node.serving.gateway import Gateway
from edge_node.serving.metrics import NodeFigures
from edge_node.serving.routes import CHAT, MESSAGES, OF_A_MODEL, RESPONSES
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.routes import App, Client

V1, V2, OWN = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb", "lorikeet@own-r1"
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "input": "hi", "max_tokens": 5}


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    for name in (V1, V2, OWN):
        await gateway.load(name, make_version(tmp_path, name))
    gateway.point(V1)
    return gateway


@pytest.mark.parametrize("path", sorted(OF_A_MODEL))
async def test_every_route_of_a_model_may_meet_the_canary(gateway: Gateway, path: str) -> None:
    gateway.aliases.point_canary(V2)
    gateway.versions._share = 1
    client = Client(App(), gateway)
    await client.request(path, QUESTION)
    assert client.headers[b"x-lorikeet-model"] == V2.encode()
    assert client.headers[b"x-lorikeet-weights"] == gateway.weights[V2].encode()
    assert set(gateway.versions.counts()) == {V2}


@pytest.mark.parametrize("path", sorted(OF_A_MODEL))
async def test_the_nodes_own_requests_meet_neither_canary_nor_own_adapter_and_count_as_nobodys(
    gateway: Gateway, path: str
) -> None:
    gateway.aliases.point_canary(V2)
    gateway.aliases.point_own(OWN)
    gateway.versions._share, gateway.versions._serve = 1, "best"
    for model, expected in ((None, V1), ("lorikeet", V1), (V2, V2)):
        app = App()
        await Client(app, gateway, of_the_node=True).request(path, QUESTION | {"model": model})
        assert app.requests[0]["model"] == expected
    assert gateway.versions.counts() == {}, "a candidate's evaluation is no client's answer"


@pytest.mark.parametrize(
    ("path", "said"),
    [(CHAT, {"user": "ada"}), (RESPONSES, {"user": "ada"}),
     (MESSAGES, {"metadata": {"user_id": "ada"}})],
)  # fmt: skip
async def test_a_user_meets_the_same_version_in_every_api(
    gateway: Gateway, path: str, said: dict[str, Any]
) -> None:
    gateway.aliases.point_canary(V2)
    gateway.versions._share = 0.5
    expected = gateway.versions.choose(None, None, "ada")
    for _ in range(20):
        app = App()
        await Client(app, gateway).request(path, QUESTION | said)
        assert app.requests[0]["model"] == expected


@pytest.mark.parametrize("path", sorted(OF_A_MODEL))
async def test_a_key_of_own_adapters_gets_one_on_every_route(gateway: Gateway, path: str) -> None:
    gateway.aliases.point_own(OWN)
    gateway.versions._serve_keys = {"desk": "best"}
    app = App()
    await Client(app, gateway).request(path, QUESTION, key=make_key("desk"))
    assert app.requests[0]["model"] == OWN


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
@pytest.mark.parametrize("breaks", ["raises", "raises after its beginning", "500"])
async def test_an_engine_that_ends_before_the_first_token_is_503_in_every_api(
    gateway: Gateway, path: str, breaks: str
) -> None:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        gateway.engine.errored = True  # type: ignore[misc]
        if breaks == "500":
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "dead"}}'})
            return
        if breaks != "raises":
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            piece = b"event: response.created\ndata: {}\n\n"
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        raise RuntimeError("EngineCore died")

    client = Client(app, gateway)  # type: ignore[arg-type]
    answer = await client.request(path, QUESTION | {"stream": True})
    assert (client.status, client.headers[b"retry-after"]) == (503, b"5")
    assert "engine has ended" in answer["error"]["message"]
    assert gateway.versions.counts()[V1]["errors"] == 1
    assert gateway.aliases.in_flight == {}


async def test_a_stream_that_breaks_after_its_first_piece_counts_as_an_error(
    gateway: Gateway,
) -> None:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        error = json.dumps({"error": {"message": "dead", "code": 500}})
        for piece in ('data: {"id": "chatcmpl-1"}\n\n', f"data: {error}\n\n", ""):
            more = piece != ""
            await send({"type": "http.response.body", "body": piece.encode(), "more_body": more})

    client = Client(app, gateway)  # type: ignore[arg-type]
    await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, gateway.versions.counts()[V1]["errors"]) == (200, 1)


async def test_a_client_that_goes_away_is_no_error_of_the_version(gateway: Gateway) -> None:
    async def app(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    await Client(app, gateway).request(CHAT, QUESTION)  # type: ignore[arg-type]
    assert gateway.versions.counts()[V1]["errors"] == 0


async def test_what_a_client_calls_a_model_is_no_label_of_metrics(
    gateway: Gateway, tmp_path: Path
) -> None:
    hidden = "lorikeet@v3-cccccccc"
    await gateway.load(hidden, make_version(tmp_path, "v3"), proved=False)
    labels = set()

    async def during() -> None:
        for metric in NodeFigures(gateway).collect():
            labels.update(sample.labels.get("version") for sample in metric.samples)

    app = App()
    app.during = during
    await Client(app, gateway).request(CHAT, QUESTION | {"model": "my secret project"})
    await Client(app, gateway, of_the_node=True).request(CHAT, QUESTION | {"model": hidden})
    assert labels - {None} == {gateway.aliases.base, V1, V2, OWN, "other"}


def make_key(name: str) -> Key:
    return Key(name=name, sha256="0" * 64, scopes=(Scope.INFER,), created=datetime.now(UTC))
