from __future__ import annotations

import json
from typing import Any

import pytest

from edge_node.access import Scope, create_key, keys_file
from edge_node.serving.access import AccessMiddleware
from edge_node.serving.anthropic_errors import in_anthropics_form
from edge_node.serving.asgi import Message
from edge_node.serving.gateway import Gateway
from tests.fakes.gateway import make_gateway


async def sent(*messages: Message) -> tuple[int, dict[bytes, bytes], Any]:
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    through = in_anthropics_form(send)
    for message in messages:
        await through(message)
    start, *bodies = got
    return (
        start["status"],
        dict(start["headers"]),
        b"".join(body.get("body", b"") for body in bodies),
    )


def start(status: int, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(piece: bytes, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": more}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
async def test_an_error_has_anthropics_form_and_its_message(status: int, kind: str) -> None:
    error = json.dumps({"error": {"message": "n is 5", "type": "X", "code": status}}).encode()
    headers = [(b"content-length", b"1"), (b"retry-after", b"5"), (b"Content-Type", b"x")]
    got, names, text = await sent(start(status, *headers), body(error[:9], True), body(error[9:]))
    document = json.loads(text)
    assert document == {"type": "error", "error": {"type": kind, "message": "n is 5"}}
    assert (got, names[b"retry-after"]) == (status, b"5")
    assert names[b"content-length"] == str(len(text)).encode()
    assert names[b"content-type"] == b"application/json"


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b'{"error": 5}', b'{"error": {"message": 5}}'])
async def test_an_error_without_a_message_says_its_status(text: bytes) -> None:
    _, _, got = await sent(start(500), body(text))
    assert json.loads(got)["error"]["message"] == "The request failed with HTTP 500."


async def test_an_answer_goes_on_as_it_is() -> None:
    got = await sent(start(200, (b"x", b"y")), body(b"a", True), body(b'{"error": 1}'))
    assert got == (200, {b"x": b"y"}, b'a{"error": 1}')


@pytest.mark.parametrize(
    ("path", "expected"), [("/v1/messages", "authentication_error"), ("/v1/responses", None)]
)
async def test_the_route_decides_about_the_form(
    tmp_path: Any, path: str, expected: str | None
) -> None:
    gateway: Gateway = make_gateway(tmp_path)
    create_key(keys_file(gateway.settings), "app", [Scope.INFER], None)
    gateway.keys.refresh()
    got: list[Message] = []

    async def send(message: Message) -> None:
        got.append(message)

    async def inside(scope: Message, receive: Any, send: Any) -> None:
        raise AssertionError("nobody is let in")

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    await AccessMiddleware(inside, gateway)(scope, None, send)  # type: ignore[arg-type]
    document = json.loads(got[1]["body"])
    assert document.get("type") == ("error" if expected else None)
    assert document["error"]["type"] == (expected or "AuthenticationError")
    ids = {name: value for name, value in got[0]["headers"] if name.endswith(b"request-id")}
    assert set(ids) == ({b"x-request-id", b"request-id"} if expected else {b"x-request-id"})
    assert len(set(ids.values())) == 1
