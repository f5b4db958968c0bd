"""The outermost layer: every route, with every kind of key, before anything reads the request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.access import Keyring, Quotas, Scope, create_key, keys_file
from edge_node.serving.access import AccessMiddleware
from edge_node.serving.asgi import Message
from edge_node.serving.completion import KEY_OF_REQUEST, user_of
from edge_node.serving.feedback_routes import FeedbackRoutes
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.routes import ALLOWED, ANTHROPIC
from edge_node.serving_settings import LimitsSettings
from tests.fakes.gateway import make_gateway, make_version
from tests.unit.edge_node.serving.test_middleware import CHAT, QUESTION, V1, App

Headers = list[tuple[bytes, bytes]]
EVERYTHING = [*sorted(ALLOWED), "/v1/load_lora_adapter", "/docs"]
PROBES = {"/health", "/ready"}


class Inside:
    """Stands for all layers inside; says with which scope a request came."""

    def __init__(self) -> None:
        self.scopes: list[Message] = []
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        await self.goes_on.wait()
        headers = [(b"content-type", b"application/json"), (b"X-Request-Id", b"vllms")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    def __init__(self, gateway: Gateway, app: Any = None) -> None:
        self.inside = app or Inside()
        self._middleware = AccessMiddleware(self.inside, gateway)
        self.status, self.headers, self.answer = 0, dict[bytes, bytes](), Any

    async def ask(
        self, path: str, headers: Headers | None = None, *, method: str = "POST", body: Any = None
    ) -> int:
        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], dict(message["headers"])
                names = [name.lower() for name, _ in message["headers"]]
                assert names.count(b"x-request-id") == 1
            elif message["body"]:
                self.answer = json.loads(message["body"])

        scope = {"type": "http", "method": method, "path": path, "headers": headers or []}
        await self._middleware(scope, receive, send)
        return self.status


def bearer(key: str) -> Headers:
    return [(b"authorization", f"Bearer {key}".encode())]


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    return gateway


def make_key(gateway: Gateway, *scopes: str, user: str | None = None, name: str = "app") -> str:
    key = create_key(keys_file(gateway.settings), name, [Scope(scope) for scope in scopes], user)
    gateway.keys.refresh()
    return key


@pytest.mark.parametrize("path", EVERYTHING)
async def test_every_route_but_the_probes_needs_a_key(gateway: Gateway, path: str) -> None:
    make_key(gateway, "infer")
    wrong = [[], bearer("lk-wrong"), bearer(""), [(b"x-api-key", b"lk-wrong")]]
    wrong += [[(b"authorization", b"Basic YWxhOmI=")], [(b"authorization", b"Bearer")]]
    for method in ("GET", "POST", "HEAD", "OPTIONS"):
        for headers in wrong:
            client = Client(gateway)
            status = await client.ask(path, headers, method=method)
            assert status == (200 if path in PROBES else 401), (method, headers)
            assert len(client.inside.scopes) == (path in PROBES)
            if path in PROBES:
                continue
            assert client.headers[b"www-authenticate"].startswith(b"Bearer")
            error = client.answer["error"]
            if path in ANTHROPIC:
                assert client.answer["type"] == "error"
                assert (set(error), error["type"]) == ({"message", "type"}, "authentication_error")
            else:
                assert set(error) == {"message", "type", "param", "code"}
                assert (error["type"], error["code"]) == ("AuthenticationError", 401)
            assert "edge-node keys create" in error["message"]
            assert "wrong" not in error["message"]


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/chat/completions", "infer"),
        ("/v1/completions", "infer"),
        ("/v1/models", "infer"),
        ("/v1/feedback", "feedback"),
        ("/metrics", "admin"),
        ("/version", "admin"),
    ],
)
async def test_a_route_needs_its_scope_and_no_other(
    gateway: Gateway, path: str, scope: str
) -> None:
    for number, each in enumerate(Scope):
        key = make_key(gateway, each, name=f"k{number}")
        client = Client(gateway)
        for headers in (bearer(key), [(b"x-api-key", key.encode())]):
            assert await client.ask(path, headers) == (200 if each == scope else 403), each
        if each != scope:
            error = client.answer["error"]
            assert (error["type"], error["code"]) == ("PermissionDeniedError", 403)
            assert f"has the scopes {each}; {path} needs {scope}" in error["message"]
            assert client.inside.scopes == []


async def test_any_key_is_told_that_there_is_no_such_route(gateway: Gateway) -> None:
    client = Client(gateway, LorikeetMiddleware(App(), gateway))
    assert await client.ask("/v1/load_lora_adapter", bearer(make_key(gateway, "infer"))) == 404


@pytest.mark.parametrize("scheme", [b"bearer ", b"BEARER  ", b"Bearer "])
async def test_the_scheme_has_no_case(gateway: Gateway, scheme: bytes) -> None:
    key = make_key(gateway, "infer").encode()
    assert await Client(gateway).ask(CHAT, [(b"authorization", scheme + key)]) == 200
    both = [(b"authorization", b"Basic x"), (b"x-api-key", key)]
    assert await Client(gateway).ask(CHAT, both) == 200


async def test_a_loopback_node_without_keys_asks_for_none(gateway: Gateway) -> None:
    client = Client(gateway)
    assert await client.ask(CHAT, bearer("none")) == 200
    assert user_of(client.inside.scopes[0]) is None


async def test_an_open_node_still_knows_whose_key_it_is(gateway: Gateway) -> None:
    key = make_key(gateway, "infer", user="alice")
    serving = gateway.settings.serving.model_copy(update={"access": "open"})
    gateway.settings = gateway.settings.model_copy(update={"serving": serving})
    gateway.keys = Keyring(gateway.settings, gateway.problems)
    client = Client(gateway)
    assert await client.ask("/metrics") == 200
    assert await client.ask("/metrics", bearer(key)) == 200
    assert [user_of(scope) for scope in client.inside.scopes] == [None, "alice"]


async def test_a_browsers_preflight_has_no_key(gateway: Gateway) -> None:
    make_key(gateway, "infer")
    headers = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]
    for asked, method, status in (
        (headers, "OPTIONS", 200),
        (headers, "POST", 401),
        (headers[:1], "OPTIONS", 401),
        (headers[1:], "OPTIONS", 401),
    ):
        assert await Client(gateway).ask(CHAT, asked, method=method) == status


async def test_a_request_keeps_its_id(gateway: Gateway) -> None:
    key = make_key(gateway, "infer")
    client = Client(gateway)
    await client.ask(CHAT, [*bearer(key), (b"x-request-id", b"mine-1")])
    assert client.headers[b"x-request-id"] == b"mine-1"
    assert (b"x-request-id", b"mine-1") in client.inside.scopes[0]["headers"]
    seen = set()
    for bad in (b"", b"two words", b"x" * 129, b"\xff"):
        await client.ask(CHAT, [*bearer(key), (b"x-request-id", bad)])
        seen.add(client.headers[b"x-request-id"])
    await client.ask(CHAT)
    seen.add(client.headers[b"x-request-id"])
    assert (len(seen), {len(each) for each in seen}) == (5, {32})


async def test_a_key_that_asks_too_often_waits(gateway: Gateway) -> None:
    gateway.quotas = Quotas(LimitsSettings(requests_per_minute=2), clock=lambda: 0.0)
    first, second = make_key(gateway, "infer"), make_key(gateway, "infer", name="other")
    client = Client(gateway)
    assert [await client.ask(CHAT, bearer(first)) for _ in range(3)] == [200, 200, 429]
    assert client.headers[b"retry-after"] == b"30"
    assert client.answer["error"]["type"] == "RateLimitError"
    assert await client.ask(CHAT, bearer(second)) == 200
    assert await client.ask("/health") == 200
    assert await client.ask(CHAT, bearer("lk-wrong")) == 401, "a guess uses nobody's share up"


async def test_requests_in_flight_are_bounded_for_each_key(gateway: Gateway) -> None:
    gateway.quotas = Quotas(LimitsSettings(concurrent_requests=1))
    first, second = make_key(gateway, "infer"), make_key(gateway, "infer", name="other")
    client = Client(gateway)
    client.inside.goes_on.clear()
    waiting = asyncio.create_task(client.ask(CHAT, bearer(first)))
    while not client.inside.scopes:
        await asyncio.sleep(0)
    assert await Client(gateway).ask(CHAT, bearer(first)) == 429
    assert await Client(gateway).ask(CHAT, bearer(second)) == 200
    waiting.cancel()  # as a client that hangs up
    await asyncio.gather(waiting, return_exceptions=True)
    assert await Client(gateway).ask(CHAT, bearer(first)) == 200


async def test_only_http_is_looked_at(gateway: Gateway) -> None:
    make_key(gateway, "infer")
    inside = Inside()
    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": CHAT}):
        seen: list[Message] = []

        async def send(message: Message, seen: list[Message] = seen) -> None:
            seen.append(message)

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        await AccessMiddleware(LorikeetMiddleware(inside, gateway), gateway)(scope, receive, send)
        assert scope["type"] == "lifespan" or seen[0]["type"] == "websocket.close"
    assert [scope["type"] for scope in inside.scopes] == ["lifespan"]


async def test_the_user_of_a_key_is_kept_and_only_theirs_is_judged(gateway: Gateway) -> None:
    alice = make_key(gateway, "infer", "feedback", user="alice")
    client = Client(gateway, LorikeetMiddleware(App(), gateway))
    assert await client.ask(CHAT, bearer(alice), body=QUESTION) == 200
    kept = gateway.store.interaction("chatcmpl-1")
    assert kept is not None
    assert kept.user == "alice"

    bob = make_key(gateway, "feedback", user="bob", name="bob")
    desk = make_key(gateway, "feedback", name="desk")

    async def judge(scope: Message, receive: Any, send: Any) -> None:
        from fastapi import Request

        response = await FeedbackRoutes(lambda: gateway).post(Request(scope, receive))
        await response(scope, receive, send)

    client = Client(gateway, judge)
    statuses, texts = [], set()
    for key in (bob, alice, desk):
        body = {"id": "chatcmpl-1", "score": 1}
        statuses.append(await client.ask("/v1/feedback", bearer(key), body=body))
    assert statuses == [404, 200, 200]
    for asked in ("chatcmpl-1", "chatcmpl-2"):
        await client.ask("/v1/feedback", bearer(bob), body={"id": asked, "score": 0})
        texts.add(client.answer["error"]["message"].replace(asked, "ID"))
    assert len(texts) == 1, "whose an answer is stays unsaid"


async def test_the_nodes_own_scope_names_no_user(gateway: Gateway) -> None:
    assert user_of({"type": "http"}) is None
    assert user_of({KEY_OF_REQUEST: None}) is None
