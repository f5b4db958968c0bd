"""The routes beside chat and completions: versions, bounds, state, and how their streams begin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.serving.events import error_of, is_last, is_preamble, status_of
from edge_node.serving.gateway import Gateway
from edge_node.serving.limits import bound, longest_prompt
from edge_node.serving.refusals import PROGRESS, Unreadable, refusing
from edge_node.serving.responses import without_state
from edge_node.serving.routes import (
    ALLOWED,
    ANSWERS,
    COUNT_TOKENS,
    DETOKENIZE,
    MESSAGES,
    OF_A_MODEL,
    RESPONSES,
    SCORING,
    TEXT,
    TOKENIZE,
)
from edge_node.serving_settings import LimitsSettings
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.routes import App, Client

V1 = "lorikeet@v1-aaaaaaaa"
LIMITS = LimitsSettings(prompts=4, max_tokens=100)


@pytest.fixture
async def gateway(tmp_path: Path) -> Gateway:
    gateway = make_gateway(tmp_path)
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    return gateway


@pytest.mark.parametrize("path", sorted(OF_A_MODEL))
async def test_every_route_of_a_model_gets_the_exact_version(gateway: Gateway, path: str) -> None:
    app, in_flight = App(), dict[str, int]()

    async def during() -> None:
        in_flight.update(gateway.aliases.in_flight)

    app.during = during
    client = Client(app, gateway)
    await client.request(path, {"model": "lorikeet", "input": "hi", "request_id": "mine"})
    assert in_flight == {V1: 1}, "a drain and an unload wait for it"
    assert client.status == 200
    assert app.requests[0]["model"] == V1
    assert "request_id" not in app.requests[0]
    assert gateway.aliases.in_flight == {}


@pytest.mark.parametrize("path", sorted(OF_A_MODEL))
async def test_a_node_that_drains_takes_no_new_request(gateway: Gateway, path: str) -> None:
    gateway.draining = True
    client = Client(App(), gateway)
    await client.request(path, {"model": "lorikeet"})
    assert (client.status, client.headers[b"retry-after"]) == (503, b"5")


async def test_a_model_that_writes_has_no_embeddings(gateway: Gateway) -> None:
    client = Client(App(), gateway)
    answer = await client.request("/v1/embeddings", {"model": "lorikeet", "input": "x"})
    assert client.status == 404
    assert "has no embeddings" in answer["error"]["message"]
    assert ANSWERS < OF_A_MODEL < ALLOWED


@pytest.mark.parametrize(
    "field",
    [
        {"previous_response_id": "resp_1"},
        {"previous_response_id": ""},
        {"conversation": {"id": "c"}},
        {"background": True},
        {"background": "yes"},
    ],
    ids=str,
)
def test_a_response_that_needs_memory_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(Unreadable) as caught:
        without_state({"input": "hi"} | field)
    assert caught.value.param == next(iter(field))


@pytest.mark.parametrize("store", [{}, {"store": True}, {"store": False}, {"store": None}])
def test_a_response_is_never_stored(store: dict[str, Any]) -> None:
    request = {"input": "hi", "background": False, "previous_response_id": None} | store
    without_state(request)
    assert request["store"] is False


def test_what_store_cannot_be_is_vllms_to_judge() -> None:
    request = {"input": "hi", "store": "x"}
    without_state(request)
    assert request["store"] == "x"


@pytest.mark.parametrize(
    ("path", "request_", "field", "text"),
    [
        (RESPONSES, {"max_output_tokens": 101}, "max_output_tokens", "at most 100"),
        (MESSAGES, {"max_tokens": 101}, "max_tokens", "at most 100"),
        (TOKENIZE, {"prompt": "x" * 4097}, "prompt", "has 4097 characters"),
        (DETOKENIZE, {"tokens": [1] * 513}, "tokens", "has 513 tokens"),
        (SCORING, {"items": ["a"] * 5}, "items", "has 5 entries; this node takes at most 4"),
        (SCORING, {"label_token_ids": [1] * 5}, "label_token_ids", "at most 4"),
    ],
)
def test_what_is_too_much_is_named(
    path: str, request_: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(Unreadable) as caught:
        bound(path, request_, LIMITS, 512, 4096)
    assert text in str(caught.value)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("path", "added"),
    [
        (RESPONSES, {"max_output_tokens": 100}),
        (MESSAGES, {}),
        (COUNT_TOKENS, {}),
        (TOKENIZE, {}),
        (DETOKENIZE, {}),
        (SCORING, {}),
    ],
)
def test_only_an_answer_gets_a_length(path: str, added: dict[str, Any]) -> None:
    request: dict[str, Any] = {}
    bound(path, request, LIMITS, 512, 4096)
    assert request == added


def test_beam_search_may_be_given_what_it_has_written() -> None:
    limits = LimitsSettings(prompt_tokens=10)
    assert longest_prompt({}, limits) == 10
    assert longest_prompt({"use_beam_search": True, "max_tokens": 5}, limits) == 15
    assert longest_prompt({"use_beam_search": True}, limits) is None
    assert longest_prompt({}, LIMITS) is None


class Engine:
    """Stands for the routes of vLLM: asks the engine, and fails as /v1/responses does."""

    def __init__(self, *before: bytes, tokens: int = 11, error: Exception | None = None) -> None:
        self._before, self._tokens, self._error = before, tokens, error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        event_stream = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": event_stream})
        for event in self._before:
            await send({"type": "http.response.body", "body": event, "more_body": True})

        async def generate(prompt: Any, sampling: Any) -> Any:
            if self._error is not None:
                raise self._error
            yield "a token"

        class Sampling:
            structured_outputs = None

        try:
            async for _ in refusing(generate)({"prompt_token_ids": [1] * self._tokens}, Sampling()):
                pass
        except Exception as error:
            raise RuntimeError("Caught handled exception, but response already started.") from error
        await send({"type": "http.response.body", "body": b"event: x\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


CREATED = b'event: response.created\ndata: {"type": "response.created"}\n\n'
PROGRESSES = b'event: response.in_progress\ndata: {"type": "response.in_progress"}\n\n'


def bounded(gateway: Gateway, most: int) -> Gateway:
    limits = LimitsSettings(prompt_tokens=most)
    serving = gateway.settings.serving.model_copy(update={"limits": limits})
    gateway.settings = gateway.settings.model_copy(update={"serving": serving})
    return gateway


async def test_a_stream_that_breaks_before_its_first_token_is_a_400(gateway: Gateway) -> None:
    pytest.importorskip("vllm")
    client = Client(Engine(CREATED, PROGRESSES), bounded(gateway, 10))
    answer = await client.request(RESPONSES, {"input": "hi", "stream": True})
    assert client.status == 400
    expected = "The prompt has 11 tokens; this node takes at most 10"
    assert expected in answer["error"]["message"]
    assert PROGRESS.get() is None


async def test_what_the_engine_will_not_begin_is_a_400_in_a_stream_too(gateway: Gateway) -> None:
    pytest.importorskip("vllm")
    broken = Engine(CREATED, PROGRESSES, error=ValueError("Grammar error: unclosed group"))
    client = Client(broken, gateway)
    answer = await client.request(RESPONSES, {"input": "hi", "stream": True})
    assert client.status == 400
    assert answer["error"]["message"] == "Grammar error: unclosed group"


async def test_a_failure_of_the_engine_stays_one(gateway: Gateway) -> None:
    pytest.importorskip("vllm")
    client = Client(Engine(CREATED, error=OSError("the engine is dead")), gateway)
    with pytest.raises(RuntimeError):
        await client.request(RESPONSES, {"input": "hi", "stream": True})
    assert client.status == 0, "vLLM's own layer answers 500"


class Named:
    """Stands for /v1/messages: what chat refuses is an error of another kind there."""

    def __init__(self, refused: bool) -> None:
        self._refused = refused

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if self._refused and (progress := PROGRESS.get()) is not None:
            progress.in_engine, progress.refused = True, "Grammar error: Invalid type: foo"
        event_stream = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": event_stream})
        error = {"type": "error", "error": {"type": "internal_error", "message": "2 errors"}}
        event = f"event: error\ndata: {json.dumps(error)}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize(("refused", "status"), [(True, 400), (False, 500)])
async def test_a_stream_of_messages_says_what_the_client_has_to_change(
    gateway: Gateway, refused: bool, status: int
) -> None:
    client = Client(Named(refused), gateway)
    answer = await client.request(MESSAGES, {"messages": [], "stream": True})
    assert client.status == status
    expected = "Grammar error: Invalid type: foo" if refused else "2 errors"
    assert answer["error"]["message"] == expected


async def test_what_messages_fails_on_before_the_engine_is_a_400(gateway: Gateway) -> None:
    pytest.importorskip("vllm")
    client = Client(App(status=500), gateway)
    answer = await client.request(MESSAGES, {"messages": 5, "max_tokens": 3})
    assert client.status == 400
    assert answer["error"]["message"].startswith("messages is 5; ")
    other = Client(App(status=500), gateway)
    await other.request(RESPONSES, {"input": "hi"})
    assert other.status == 500


async def test_a_stream_within_the_bound_has_all_its_events(gateway: Gateway) -> None:
    client = Client(Engine(CREATED, PROGRESSES, tokens=10), bounded(gateway, 10))
    await client.request(RESPONSES, {"input": "hi", "stream": True})
    assert client.status == 200
    assert b"".join(client.pieces) == CREATED + PROGRESSES + b"event: x\n\n"


async def test_only_what_the_engine_made_shows_that_it_does_not_hang(gateway: Gateway) -> None:
    pytest.importorskip("vllm")
    gateway.last_progress = 0.0
    for path in sorted(OF_A_MODEL):
        await Client(App(), gateway).request(path, {"model": V1, "input": "hi"})
    await Client(Engine(CREATED), bounded(gateway, 10)).request(RESPONSES, {"input": "hi"})
    assert gateway.last_progress == 0.0, "no engine had these requests"
    await Client(Engine(CREATED, tokens=10), gateway).request(RESPONSES, {"input": "hi"})
    assert gateway.last_progress > 0.0


@pytest.mark.parametrize(
    ("event", "message", "status"),
    [
        (b'data: {"error": {"message": "m", "code": 404}}\n\n', "m", 404),
        (b'event: error\ndata: {"type": "error", "error": {"message": "m"}}\n\n', "m", 500),
    ],
)
def test_an_error_is_read_in_both_forms(event: bytes, message: str, status: int) -> None:
    error = error_of(event)
    assert (error["message"], status_of(error)) == (message, status)


def test_a_piece_of_an_answer_is_no_error_and_not_the_last() -> None:
    text = json.dumps({"delta": "event: message_stop\nevent: error\ndata: [DONE]\n\n"}).encode()
    piece = b"event: content_block_delta\ndata: " + text + b"\n\n"
    for path in (RESPONSES, MESSAGES, TEXT):
        assert error_of(piece) is None
        assert not is_last(path, piece)
        assert not is_preamble(piece)
    assert is_last(MESSAGES, b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert is_last(RESPONSES, b"event: response.completed\ndata: {}\n\n")
    assert is_last(TEXT, b"data: [DONE]\n\n")
