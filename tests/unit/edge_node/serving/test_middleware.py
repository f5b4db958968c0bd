from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_node.capture import SERVED, Generation
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware, Message
from tests.fakes.gateway import make_gateway, make_version

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"
CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    await gateway.load(V2, make_version(tmp_path, "v2"))
    gateway.point(V1)
    return gateway


class App:
    """Stands for vLLM: answers with the model it was asked for; `during` runs before the answer."""

    def __init__(self, *, stream: bool = False, status: int = 200) -> None:
        self.stream, self.status = stream, status
        self.requests: list[Any] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.during: Any = None

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        body = (await receive())["body"]
        try:
            request = json.loads(body)
        except ValueError:
            request = body
        self.requests.append(request)
        if self.during is not None:
            await self.during()
        if (served := SERVED.get()) is not None:
            served.generations.append(Generation(text_only=True, prompt_ids=[5, 6], answer_ids=[7, 2]))
        kind = b"text/event-stream; charset=utf-8" if self.stream else b"application/json"
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", kind)]})
        model = request.get("model") if isinstance(request, dict) else None
        if self.stream:
            choices = [{"index": 0, "delta": {"content": "yes"}, "finish_reason": "stop"}]
            chunk = json.dumps({"id": "chatcmpl-1", "model": model, "choices": choices})
            for piece in (f"data: {chunk}\n\n", "data: [DONE]\n\n", ""):
                await send({"type": "http.response.body", "body": piece.encode(), "more_body": piece != ""})
        else:
            choices = [{"index": 0, "message": {"content": "yes"}, "finish_reason": "stop"}]
            answer = json.dumps({"id": "chatcmpl-1", "model": model, "choices": choices}).encode()
            await send({"type": "http.response.body", "body": answer})


class Client:
    def __init__(self, app: App, gateway: Gateway) -> None:
        self._middleware, self._gateway = LorikeetMiddleware(app, gateway), gateway
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.pieces: list[bytes] = []
        self.on_disk_at_piece: list[bool] = []

    async def request(self, path: str, body: Any = None, *, method: str = "POST", headers: Any = ()) -> Any:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages = [
            {"type": "http.request", "body": raw[:5], "more_body": True},
            {"type": "http.request", "body": raw[5:], "more_body": False},
        ]

        async def receive() -> Message:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], dict(message["headers"])
            else:
                with sqlite3.connect(self._gateway.settings.data_dir / "experience.db") as db:
                    self.on_disk_at_piece.append(bool(db.execute("SELECT COUNT(*) FROM interactions").fetchone()[0]))
                self.pieces.append(message["body"])

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
        await self._middleware(scope, receive, send)
        text = b"".join(self.pieces)
        return json.loads(text) if text.startswith(b"{") else text


@pytest.mark.parametrize(
    "path", ["/invocations", "/tokenize", "/v1/load_lora_adapter", "/docs", "/adapters", "//v1/models"]
)
async def test_only_the_routes_that_clients_need_are_open(gateway: Gateway, path: str) -> None:
    client = Client(App(), gateway)
    assert "No route" in (await client.request(path, {}))["error"]["message"]
    assert client.status == 404


@pytest.mark.parametrize("asked", [{"model": "lorikeet"}, {}, {"model": None}, {"model": V1}])
async def test_the_version_is_fixed_at_arrival(gateway: Gateway, asked: dict[str, Any]) -> None:
    app = App()
    client = Client(app, gateway)

    async def switch() -> None:
        assert gateway.aliases.in_flight == {V1: 1}
        gateway.point(V2)

    app.during = switch
    answer = await client.request(CHAT, QUESTION | asked)
    assert answer["model"] == V1
    assert client.headers[b"x-lorikeet-model"] == V1.encode()
    interaction = gateway.store.interaction("chatcmpl-1")
    assert interaction is not None
    assert (interaction.model, interaction.answer, interaction.messages) == (V1, "yes", QUESTION["messages"])
    assert (interaction.prompt_ids, interaction.answer_ids) == ((5, 6), (7, 2))
    assert not gateway.aliases.in_flight


async def test_the_body_waits_for_the_disk(gateway: Gateway) -> None:
    client = Client(App(), gateway)
    await client.request(CHAT, QUESTION)
    assert client.on_disk_at_piece == [True]


async def test_only_the_last_chunk_of_a_stream_waits_for_the_disk(gateway: Gateway) -> None:
    client = Client(App(stream=True), gateway)
    await client.request(CHAT, QUESTION | {"stream": True})
    assert client.pieces[1:] == [b"data: [DONE]\n\n", b""]
    assert client.on_disk_at_piece == [False, True, True]


async def test_errors_and_opted_out_answers_are_not_kept(gateway: Gateway) -> None:
    await Client(App(status=400), gateway).request(CHAT, QUESTION)
    await Client(App(), gateway).request(CHAT, QUESTION, headers=[(b"x-lorikeet-capture", b"off")])
    assert gateway.store.counts().interactions == 0
    assert gateway.recorder.counts().lost == 0


async def test_only_a_captured_request_records_its_tokens(gateway: Gateway) -> None:
    seen: list[bool] = []
    app = App()

    async def look() -> None:
        seen.append(SERVED.get() is not None)

    app.during = look
    await Client(app, gateway).request(CHAT, QUESTION)
    await Client(app, gateway).request(CHAT, QUESTION, headers=[(b"x-lorikeet-capture", b"off")])
    assert (seen, SERVED.get()) == ([True, False], None)


async def test_the_id_of_an_answer_is_the_nodes_to_give(gateway: Gateway) -> None:
    app = App()
    await Client(app, gateway).request(CHAT, QUESTION | {"request_id": "mine"}, headers=[(b"x-request-id", b"mine")])
    assert "request_id" not in app.requests[0]
    assert [name for name, _ in app.headers] == [b"content-length"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"model": 7}', b"\xff"])
async def test_what_is_no_request_is_left_to_vllm(gateway: Gateway, body: bytes) -> None:
    app = App(status=400)
    await Client(app, gateway).request(CHAT, body)
    assert len(app.requests) == 1


async def test_an_unknown_model_is_left_to_vllm_and_a_retiring_one_is_gone(gateway: Gateway) -> None:
    app = App(status=404)
    await Client(app, gateway).request(CHAT, {"model": "nope"})
    assert app.requests == [{"model": "nope"}]
    gateway.aliases.retire(V2)
    client = Client(app, gateway)
    await client.request(CHAT, {"model": V2})
    assert (client.status, len(app.requests)) == (404, 1)


async def test_draining_and_no_release_are_503_with_retry_after(gateway: Gateway, tmp_path: Path) -> None:
    fresh = Client(App(), make_gateway(tmp_path / "fresh"))
    await fresh.request(CHAT, QUESTION)
    assert (fresh.status, fresh.headers[b"retry-after"]) == (503, b"5")
    gateway.draining = True
    for path, status in ((CHAT, 503), ("/v1/feedback", 503), ("/v1/models", 503), ("/health", 200), ("/ready", 200)):
        client = Client(App(), gateway)
        await client.request(path, QUESTION)
        assert client.status == status, path


async def test_bodies_that_cannot_be_read_are_refused_here(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    client = Client(app, gateway)
    assert "nested too deeply" in (await client.request(CHAT, b"[" * 200_000))["error"]["message"]
    assert client.status == 400
    monkeypatch.setattr("edge_node.serving.middleware.MAX_BODY_BYTES", 100)
    for path in (CHAT, "/v1/feedback"):
        client = Client(app, gateway)
        await client.request(path, b'"' + b"x" * 200 + b'"')
        assert client.status == 413
    assert app.requests == []


class Vllm(App):
    """As vLLM: it stops at a disconnect and then answers `null` with 200."""

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass
        kind = b"text/event-stream" if self.stream else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if self.stream else b"null"})


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_loses_nothing(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    await Client(Vllm(stream=stream), gateway).request(CHAT, QUESTION | {"stream": stream})
    gateway.recorder.close()
    counts = gateway.recorder.counts()
    assert (counts.captured, counts.lost, counts.skipped) == (0, 0, 0)
    assert "lost" not in caplog.text
