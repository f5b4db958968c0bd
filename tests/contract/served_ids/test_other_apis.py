"""/v1/responses and /v1/messages through vLLM's own code: what is kept is what the engine had."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from tests.contract.served_ids.running import Running, trained
from tests.fakes.vllm_server import VERSION

pytestmark = pytest.mark.timeout(240)
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"at": "Oslo"}}\n</tool_call>'
ASKED: dict[str, dict[str, Any]] = {
    RESPONSES: {
        "input": "Rain?",
        "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
        "max_output_tokens": 500,
    },
    MESSAGES: {
        "messages": [{"role": "user", "content": "Rain?"}],
        "system": "Be brief.",
        "tools": [{"name": "weather", "input_schema": SCHEMA}],
        "max_tokens": 500,
    },
}
END = "<|im_end|>"
"""vLLM shows special tokens where a request has tools, and this engine writes the last one."""
PATHS = pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
STREAMS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def ask(running: Running, path: str, made: str, **more: Any) -> Any:
    """The response to the question of `path`, for which the engine makes `made`."""
    engine = running.server.engine
    before, engine.answer = engine.answer, running.renderer.answer_ids(made)
    try:
        return running.post(path, {"model": "lorikeet", **ASKED[path], **more})
    finally:
        engine.answer = before


def last_event(response: Any) -> Any:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return json.loads(lines[-1])


def answer_id(response: Any, path: str) -> str:
    if response.headers["content-type"].startswith("application/json"):
        return str(response.json()["id"])
    first = json.loads(response.text.splitlines()[1].removeprefix("data: "))
    return str(first["message" if path == MESSAGES else "response"]["id"])


@PATHS
@STREAMS
@pytest.mark.parametrize("made", ["It rains.", CALL], ids=["text", "call"])
def test_an_answer_is_kept_as_the_engine_made_it(
    qwen: Running, path: str, stream: bool, made: str
) -> None:
    response = ask(qwen, path, made, stream=stream)
    assert response.status_code == 200, response.text
    assert response.headers["x-lorikeet-model"] == VERSION
    assert VERSION in response.text
    kept = qwen.server.gateway.store.interaction(answer_id(response, path))
    assert kept is not None, "it is on disk when the answer has gone out"
    assert (kept.model, kept.endpoint) == (VERSION, path)
    assert kept.answer == ("" if made is CALL else f"{made}{END}")
    assert kept.finish_reason == ("tool_calls" if made is CALL else "stop")
    assert [message["role"] for message in kept.messages] == ["system", "user"]
    assert list(kept.answer_ids) == qwen.renderer.answer_ids(made)
    assert list(kept.prompt_ids) == qwen.server.engine.prompts[-1]
    told = qwen.post("/v1/feedback", {"id": kept.id, "score": 1}).json()
    assert told["usable"], told
    row = trained(qwen, told["id"])
    assert row.input_ids == list(kept.prompt_ids) + list(kept.answer_ids)


@PATHS
@STREAMS
def test_an_answer_that_was_cut_off_says_so(qwen: Running, path: str, stream: bool) -> None:
    before, qwen.server.engine.stop = qwen.server.engine.stop, ("length", None)
    try:
        response = ask(qwen, path, "It ra", stream=stream)
    finally:
        qwen.server.engine.stop = before
    kept = qwen.server.gateway.store.interaction(answer_id(response, path))
    assert kept is not None
    assert (kept.finish_reason, kept.answer) == ("length", f"It ra{END}")


def test_vllm_writes_no_request_of_messages_into_its_log(qwen: Running) -> None:
    assert qwen.server.http is not None
    logger = logging.getLogger("vllm.entrypoints.anthropic.api_router")
    assert not logger.isEnabledFor(logging.ERROR), "its errors quote what they could not read"


@PATHS
def test_a_client_may_keep_its_answer_to_itself(qwen: Running, path: str) -> None:
    off = {"x-lorikeet-capture": "off"}
    response = qwen.post(path, {"model": "lorikeet", **ASKED[path]}, **off)
    assert response.status_code == 200
    assert qwen.server.gateway.store.interaction(answer_id(response, path)) is None


@STREAMS
def test_no_response_is_stored_for_the_next_request(qwen: Running, stream: bool) -> None:
    first = ask(qwen, RESPONSES, "It rains.", stream=stream, store=True)
    found = answer_id(first, RESPONSES)
    for path in (f"/v1/responses/{found}", f"/v1/responses/{found}/cancel"):
        assert qwen.post(path, {}).status_code == 404
    again = ask(qwen, RESPONSES, "x", previous_response_id=found, stream=stream)
    assert again.status_code == 400
    assert again.json()["error"]["param"] == "previous_response_id"
    assert ask(qwen, RESPONSES, "x", background=True).status_code == 400


@PATHS
@pytest.mark.parametrize(
    "wrong",
    [
        {"tools": [{"type": "function", "name": 5}]},
        {"tools": 5},
        {"input": [None], "messages": [None]},
        {"input": [{"type": "function_call"}], "messages": [{"role": "user", "content": [{}]}]},
        {"temperature": "hot"},
        {"model": "nobody"},
        {"max_output_tokens": "x", "max_tokens": "x"},
        {"chat_template_kwargs": {"tools": 5, "messages": 5}},
        {
            "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}],
        },
    ],
    ids=str,
)
@STREAMS
def test_what_cannot_be_read_is_the_clients_to_change(
    qwen: Running, path: str, wrong: dict[str, Any], stream: bool
) -> None:
    response = qwen.post(path, {"model": "lorikeet", **ASKED[path], **wrong, "stream": stream})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        document = response.json()
        assert (document.get("type") == "error") == (path == MESSAGES)
        assert document["error"]["message"]


SAID = [{"role": "user", "content": "x" * 40}]
PROMPTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "x" * 40},
    RESPONSES: {"input": SAID},
    MESSAGES: {"messages": SAID, "max_tokens": 3},
    "/generative_scoring": {"query": "x" * 40, "items": ["b"], "label_token_ids": [1]},
}


@pytest.mark.parametrize("path", sorted(PROMPTS))
@STREAMS
def test_a_prompt_beyond_the_bound_is_a_400_before_the_engine_has_it(
    qwen: Running, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    settings = qwen.server.gateway.settings
    limits = settings.serving.limits.model_copy(update={"prompt_tokens": 20})
    serving = settings.serving.model_copy(update={"limits": limits})
    bounded = settings.model_copy(update={"serving": serving})
    monkeypatch.setattr(qwen.server.gateway, "settings", bounded)
    asked = len(qwen.server.engine.prompts)
    response = qwen.post(path, {"model": "lorikeet", "stream": stream} | PROMPTS[path])
    assert response.status_code == 400, response.text
    said = response.json()["error"]["message"]
    assert "this node takes at most 20 (EDGE_SERVING__LIMITS__PROMPT_TOKENS)" in said
    assert len(qwen.server.engine.prompts) == asked


@pytest.mark.parametrize("path", sorted(PROMPTS))
@STREAMS
def test_what_the_engine_will_not_begin_is_a_400(
    qwen: Running, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    monkeypatch.setattr(qwen.server.engine, "refusal", ValueError("Grammar error: unclosed group"))
    response = qwen.post(path, {"model": "lorikeet", "stream": stream} | PROMPTS[path])
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"] == "Grammar error: unclosed group"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [70, 71]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ],
)
def test_routes_that_write_nothing_keep_nothing(
    qwen: Running, path: str, body: dict[str, Any]
) -> None:
    before = qwen.server.gateway.recorder.counts()
    response = qwen.post(path, {"model": "lorikeet", **body})
    # The engine of this test makes no scores.
    assert response.status_code == 200 or path == "/generative_scoring", response.text
    assert response.status_code != 200 or response.headers["x-lorikeet-model"] == VERSION
    assert qwen.server.gateway.recorder.counts() == before
