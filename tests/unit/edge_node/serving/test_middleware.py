from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.capture import SERVED
from edge_node.serving.asgi import Message
from edge_node.serving.fingerprint import WEIGHTS
from edge_node.serving.first_tokens import FirstTokens
from edge_node.serving.gateway import Gateway
from edge_node.serving_settings import LimitsSettings
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.routes import App, Client

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


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/v1/chat/completions/batch",
        "/v1/responses/resp_1",
        "/inference/v1/generate",
        "/v1/embeddings",
        "/v1/load_lora_adapter",
        "/docs",
        "/adapters",
        "//v1/models",
    ],
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
    assert client.headers[b"x-lorikeet-weights"] == gateway.weights[V1].encode()
    interaction = gateway.store.interaction("chatcmpl-1")
    assert interaction is not None
    assert (interaction.model, interaction.answer, interaction.messages) == (
        V1,
        "yes",
        QUESTION["messages"],
    )
    assert (interaction.prompt_ids, interaction.answer_ids) == ((5, 6), (7, 2))
    assert not gateway.aliases.in_flight


async def test_vllm_can_write_the_weights_of_its_request_into_the_body(gateway: Gateway) -> None:
    seen: list[str] = []
    app = App()

    async def look() -> None:
        seen.append(WEIGHTS.get())

    app.during = look
    for model in (V1, V2, "unknown"):
        await Client(app, gateway).request(CHAT, QUESTION | {"model": model})
        assert WEIGHTS.get() == ""
    assert seen == [gateway.weights[V1], gateway.weights[V2], ""]


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
    await Client(app, gateway).request(
        CHAT, QUESTION | {"request_id": "mine"}, headers=[(b"x-request-id", b"mine")]
    )
    assert "request_id" not in app.requests[0]
    assert [name for name, _ in app.headers] == [b"content-length"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"model": 7}', b"\xff"])
async def test_what_is_no_request_is_left_to_vllm(gateway: Gateway, body: bytes) -> None:
    app = App(status=400)
    await Client(app, gateway).request(CHAT, body)
    assert len(app.requests) == 1


async def test_an_unknown_model_is_left_to_vllm_and_a_retiring_one_is_gone(
    gateway: Gateway,
) -> None:
    app = App(status=404)
    await Client(app, gateway).request(CHAT, {"model": "nope"})
    assert app.requests == [{"model": "nope"}]
    gateway.aliases.retire(V2)
    client = Client(app, gateway)
    await client.request(CHAT, {"model": V2})
    assert (client.status, len(app.requests)) == (404, 1)


async def test_a_policy_of_the_learner_is_for_the_node_alone(
    gateway: Gateway, tmp_path: Path
) -> None:
    policy = "policy/r1.0a@7"
    await gateway.load(policy, make_version(tmp_path, "policy"))
    app = App()
    client = Client(app, gateway)
    answer = await client.request(CHAT, QUESTION | {"model": policy})
    assert (client.status, answer["error"]["param"]) == (404, "model")
    assert f"The model `{policy}` does not exist." in answer["error"]["message"]
    assert not app.requests
    own = Client(app, gateway, of_the_node=True)
    await own.request(CHAT, QUESTION | {"model": policy})
    assert (own.status, app.requests[0]["model"]) == (200, policy)
    assert gateway.aliases.public == [V1, V2]


async def test_a_version_that_was_not_proved_is_for_the_node_alone(
    gateway: Gateway, tmp_path: Path
) -> None:
    name = "lorikeet@v3-cccccccc"
    await gateway.load(name, make_version(tmp_path, "v3"), proved=False)
    client = Client(App(), gateway)
    answer = await client.request(CHAT, QUESTION | {"model": name})
    assert (client.status, "does not exist" in answer["error"]["message"]) == (404, True)
    await gateway.expect_held(name)
    client = Client(App(), gateway)
    await client.request(CHAT, QUESTION | {"model": name})
    assert client.status == 200


async def test_draining_and_no_release_are_503_with_retry_after(
    gateway: Gateway, tmp_path: Path
) -> None:
    fresh = Client(App(), make_gateway(tmp_path / "fresh"))
    await fresh.request(CHAT, QUESTION)
    assert (fresh.status, fresh.headers[b"retry-after"]) == (503, b"5")
    gateway.draining = True
    for path, status in (
        (CHAT, 503),
        ("/v1/feedback", 503),
        ("/v1/models", 503),
        ("/health", 200),
        ("/ready", 200),
    ):
        client = Client(App(), gateway)
        await client.request(path, QUESTION)
        assert client.status == status, path


async def test_bodies_that_cannot_be_read_are_refused_here(gateway: Gateway) -> None:
    app = App()
    client = Client(app, gateway)
    assert "nested too deeply" in (await client.request(CHAT, b"[" * 200_000))["error"]["message"]
    assert client.status == 400
    with_limits(gateway, body_mib=1)
    large = b'"' + b"x" * (1 << 20) + b'"'
    for path in (CHAT, "/v1/feedback"):
        client = Client(app, gateway)
        answer = await client.request(path, large)
        assert (client.status, "larger than 1 MiB" in answer["error"]["message"]) == (413, True)
    assert app.requests == []
    own = Client(app, gateway, of_the_node=True)
    await own.request(CHAT, large)
    assert own.status == 200


def with_limits(gateway: Gateway, **limits: Any) -> None:
    serving = gateway.settings.serving.model_copy(update={"limits": LimitsSettings(**limits)})
    gateway.settings = gateway.settings.model_copy(update={"serving": serving})


async def test_a_request_that_asks_too_much_is_refused_and_the_nodes_own_is_not(
    gateway: Gateway,
) -> None:
    app = App()
    with_limits(gateway, max_tokens=9)
    for field, value in (("n", 10_000), ("max_completion_tokens", 10)):
        client = Client(app, gateway)
        error = (await client.request(CHAT, QUESTION | {field: value}))["error"]
        assert (client.status, error["param"]) == (400, field)
        assert f"{field} is {value}; this node takes at most" in error["message"]
        assert app.requests == []
        await Client(app, gateway, of_the_node=True).request(CHAT, QUESTION | {field: value})
        assert app.requests.pop()[field] == value
    await Client(app, gateway).request(CHAT, QUESTION)
    assert app.requests.pop()["max_tokens"] == 9
    await Client(app, gateway, of_the_node=True).request(CHAT, QUESTION)
    assert "max_tokens" not in app.requests.pop()


class Vllm(App):
    """As vLLM: it stops at a disconnect and then answers `null` with 200."""

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass
        kind = b"text/event-stream" if self.stream else b"application/json"
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        )
        await send(
            {"type": "http.response.body", "body": b"data: [DONE]\n\n" if self.stream else b"null"}
        )


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_loses_nothing(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    await Client(Vllm(stream=stream), gateway).request(CHAT, QUESTION | {"stream": stream})
    gateway.recorder.close()
    counts = gateway.recorder.counts()
    assert (counts.captured, counts.lost, counts.skipped) == (0, 0, 0)
    assert "lost" not in caplog.text


class Breaking(App):
    """As vLLM when it fails with `error` after it has sent `pieces` of a stream."""

    def __init__(self, error: Exception | None, *pieces: bytes) -> None:
        super().__init__(stream=True)
        self.error, self.pieces = error, pieces

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.error is not None:
            raise self.error


async def test_a_stream_that_fails_after_its_first_event_gets_no_second_answer(
    gateway: Gateway,
) -> None:
    client = Client(Breaking(ValueError("broken"), b"data: {}\n\n"), gateway)
    with pytest.raises(ValueError, match="broken"):
        await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, client.pieces) == (200, [b"data: {}\n\n"])


async def test_a_stream_that_fails_after_its_error_gets_no_second_answer(gateway: Gateway) -> None:
    event = b'data: {"error": {"message": "no", "code": 404}}\n\n'
    client = Client(Breaking(ValueError("broken"), event), gateway)
    with pytest.raises(ValueError, match="broken"):
        await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, len(client.pieces)) == (404, 1)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ({"message": "no", "code": 400}, 400),
        ({"message": "no", "code": 599}, 599),
        ({"message": "no", "code": 600}, 500),
        ({"message": "no", "code": 200}, 500),
        ({"message": "no", "code": 0}, 500),
        ({"message": "no", "code": True}, 500),
        ({"message": "no", "code": "invalid_api_key"}, 500),
        ({"message": "no", "code": None}, 500),
        ({"message": "no", "code": 400.0}, 500),
        ({"message": "no"}, 500),
        ("no", 500),
    ],
)
async def test_an_error_without_a_usable_code_is_answered_500(
    gateway: Gateway, error: Any, status: int
) -> None:
    event = f"data: {json.dumps({'error': error})}\n\n"
    client = Client(Breaking(None, event.encode(), b"data: [DONE]\n\n"), gateway)
    answer = await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, answer) == (status, {"error": error})


async def test_an_error_and_the_end_may_come_in_one_piece(gateway: Gateway) -> None:
    event = b'data: {"error": {"message": "no", "code": 404}}\n\ndata: [DONE]\n\n'
    client = Client(Breaking(None, event), gateway)
    answer = await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, answer) == (404, {"error": {"message": "no", "code": 404}})


async def test_half_an_error_event_goes_on_as_it_came(gateway: Gateway) -> None:
    pieces = (b'data: {"error": {"mess', b'age": "no"}}\n\n')
    client = Client(Breaking(None, *pieces), gateway)
    await client.request(CHAT, QUESTION | {"stream": True})
    assert (client.status, client.pieces) == (200, list(pieces))


@pytest.mark.parametrize(
    ("stream", "of_the_node", "waits"), [(True, False, 1), (False, False, 0), (True, True, 0)]
)
async def test_only_a_users_stream_waits_for_its_first_piece(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool, of_the_node: bool, waits: int
) -> None:
    """The answer without a stream is one piece, after all of its tokens."""
    seen: list[float] = []
    now = 0.0
    monkeypatch.setattr(gateway, "first_tokens", FirstTokens(lambda: now))

    async def look() -> None:
        nonlocal now
        now += 3.0
        seen.append(gateway.first_tokens.longest_s())

    app = App(stream=stream)
    app.during = look
    client = Client(app, gateway, of_the_node=of_the_node)
    await client.request(CHAT, QUESTION | {"stream": stream})
    assert client.status == 200
    now = 4.0
    assert [*seen, gateway.first_tokens.longest_s()] == [3.0 * waits] * 2
    now = 14.0
    assert gateway.first_tokens.longest_s() == 0
