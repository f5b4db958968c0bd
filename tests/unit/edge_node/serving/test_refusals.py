from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
from typing import Any

import pytest

from edge_node.serving import completion
from edge_node.serving.gateway import Gateway
from edge_node.serving.refusals import MAX_DEPTH, Unreadable, read_request
from tests.fakes.gateway import make_gateway, make_version
from tests.unit.edge_node.serving.test_middleware import CHAT, QUESTION, V1, App, Client

DEEP = "[" * MAX_DEPTH + "]" * MAX_DEPTH


@pytest.fixture
async def gateway(tmp_path: Any) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    return gateway


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        (f'{{"top_k": {2**70}}}', "top_k", f"top_k is {2**70}; expected a whole number"),
        (f'{{"seed": {-(2**63) - 1}}}', "seed", "expected a whole number from -2\\*\\*63"),
        ('{"temperature": NaN}', "temperature", "temperature is nan; expected a finite number"),
        ('{"logit_bias": {"1": 1e999}}', "logit_bias.1", "inf; expected a finite number"),
        (r'{"stop": ["a", "\ud800"]}', "stop.1", "half a surrogate pair"),
        (r'{"logit_bias": {"\ud800": 1}}', None, "logit_bias has the key"),
        (r'{"\ud800": 1}', None, "The body has the key"),
        (f'{{"x": {DEEP}}}', None, f"at most {MAX_DEPTH} levels"),
        ('{"x": ' + "[" * 200_000, None, f"at most {MAX_DEPTH} levels"),
        ('{"top_k": ' + "9" * 5000 + "}", None, "an integer that is too long"),
        (f'{{"length_penalty": {-(2**63)}}}', "length_penalty", "expected a number from -50 to 50"),
        ('{"length_penalty": "-1e300"}', "length_penalty", "length_penalty is '-1e300'; expected"),
    ],
)
def test_a_value_that_no_field_can_take_is_named(body: str, param: str | None, text: str) -> None:
    with pytest.raises(Unreadable, match=text) as caught:
        read_request(body.encode())
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"5", b"null", b"[1e999]"])
def test_what_is_no_json_object_is_left_to_vllm(body: bytes) -> None:
    assert read_request(body) is None


def test_values_at_the_edge_are_read() -> None:
    body = {"a": 2**63 - 1, "b": -(2**63), "c": 1e308, "d": "\U0001f642", "e": [True, None]} | {
        "length_penalty": -50
    }
    assert read_request(json.dumps(body).encode()) == body


async def test_a_field_on_which_vllm_fails_is_named(gateway: Gateway) -> None:
    app = App()

    async def fail() -> None:
        raise AttributeError("'int' object has no attribute 'get'")

    app.during = fail
    client = Client(app, gateway)
    answer = await client.request(CHAT, QUESTION | {"structured_outputs": 5})
    assert client.status == 400
    assert answer["error"]["param"] == "structured_outputs"
    assert "structured_outputs is 5; Input should be" in answer["error"]["message"]
    assert not gateway.aliases.in_flight


async def test_a_failure_after_the_engine_began_is_no_fault_of_the_client(
    gateway: Gateway,
) -> None:
    from edge_node.serving.refusals import PROGRESS

    app = App()

    async def fail() -> None:
        progress = PROGRESS.get()
        assert progress is not None
        progress.in_engine = True
        raise AttributeError("a mistake in the server")

    app.during = fail
    with pytest.raises(AttributeError, match="a mistake in the server"):
        await Client(app, gateway).request(CHAT, QUESTION)


async def test_a_stream_that_begins_with_an_error_has_the_errors_status(gateway: Gateway) -> None:
    error = {"message": "bad regex", "type": "BadRequestError", "param": None, "code": 400}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await asyncio.sleep(0)
        for piece in (f"data: {json.dumps({'error': error})}\n\n", "data: [DONE]\n\n", ""):
            message = {"type": "http.response.body", "body": piece.encode()}
            await send(message | {"more_body": piece != ""})

    client = Client(app, gateway)  # type: ignore[arg-type]
    assert await client.request(CHAT, QUESTION | {"stream": True}) == {"error": error}
    assert client.status == 400
    assert client.headers[b"content-type"] == b"application/json"
    gateway.recorder.close()
    assert gateway.recorder.counts().captured == 0


async def test_other_requests_go_on_while_a_large_body_is_checked(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_on = threading.Event()

    def check(body: bytes) -> Any:
        assert went_on.wait(10), "the event loop stood still"
        return read_request(body)

    monkeypatch.setattr(completion, "read_request", check)
    large = QUESTION | {"user": "x" * completion.LARGE_BODY_BYTES}
    client = Client(App(), gateway)
    asking = asyncio.create_task(client.request(CHAT, large))
    await asyncio.sleep(0.05)
    went_on.set()
    await asking
    assert client.status == 200


def test_the_check_of_millions_of_values_takes_no_memory_for_each() -> None:
    body = b'{"prompt": [' + b"[0]," * 200_000 + b"0]}"
    tracemalloc.start()
    try:
        json.loads(body)
        parsed = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read_request(body)
        assert tracemalloc.get_traced_memory()[1] < 1.2 * parsed
    finally:
        tracemalloc.stop()
