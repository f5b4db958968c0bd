"""What a round trains on is what vLLM served, in token ids: vLLM's own API server over an engine
that only counts.

Each request also asks for `return_token_ids`, so that vLLM itself says what it served.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_node.learning.batches import IGNORED, Lesson, token_row
from edge_node.rendering import ChatFormat, load_renderer
from edge_node.serving import gateway as gateways
from tests.fakes.chat_templates import CHATML, PARTS, POSITIONS, QWEN3, STYLES, make_base
from tests.fakes.vllm_server import Server, api_server

pytestmark = pytest.mark.timeout(240)
T = TypeVar("T")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"at": "Oslo"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "wet"},
]


class Running:
    """One server on an event loop of its own, so that a plain test can ask it many times."""

    def __init__(self, style: str, *extra_args: str) -> None:
        self._stack, self._folder = AsyncExitStack(), tempfile.TemporaryDirectory(prefix="lk-")
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.base = make_base(Path(self._folder.name) / "base", style)
        self.data_dir = Path(self._folder.name) / "data"
        start = self._stack.enter_async_context(api_server(self.base, self.data_dir, *extra_args))
        self.server: Server = self.wait(start)
        self.renderer = load_renderer(self.base, ChatFormat.read(self.data_dir))
        self.statuses: list[int] = []

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def post(self, path: str, body: dict[str, Any], **headers: str) -> Any:
        gateways.here = self.server.gateway  # one of the process: other servers of this file run as well
        response = self.wait(self.server.http.post(path, json=body, headers=headers))
        self.statuses.append(response.status_code)
        return response

    def close(self) -> None:
        self.wait(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._folder.cleanup()


@pytest.fixture(scope="module", params=sorted(STYLES))
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    started = Running(request.param)
    yield started
    started.close()


def start(request: pytest.FixtureRequest, style: str, *extra_args: str) -> Running:
    started = Running(style, *extra_args)
    request.addfinalizer(started.close)
    return started


def served(response: Any) -> tuple[str, list[int], list[int]]:
    """Id, prompt ids and the first choice's answer ids, as vLLM returns them."""
    if response.headers["content-type"].startswith("application/json"):
        parts = [response.json()]
    else:
        lines = response.text.splitlines()
        parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    prompt: list[int] | None = None
    answer: list[int] = []
    for part in parts:
        prompt = part.get("prompt_token_ids") or prompt
        for choice in part["choices"]:
            prompt = prompt or choice.get("prompt_token_ids")
            if choice["index"] == 0:
                answer += choice.get("token_ids") or []
    assert prompt is not None
    return parts[0]["id"], prompt, answer


def trained(running: Running, feedback_id: str) -> Any:
    """The row that a round makes of this feedback; None when it is no example."""
    store = running.server.gateway.store
    found = [e for e in store.examples(up_to=store.cursor(), limit=10_000) if e.feedback_id == feedback_id]
    return token_row(Lesson(found[0].prompt_ids, found[0].target_ids)) if found else None


def check(running: Running, path: str, body: dict[str, Any], correction: str | None) -> bool:
    """Ask, judge, and compare; False when vLLM refused the request."""
    response = running.post(path, {"max_tokens": 3, **body, "return_token_ids": True})
    if response.status_code != 200:
        assert response.status_code == 400, response.text
        return False
    if 'data: {"error"' in response.text:  # vLLM fails on `echo` of parts in the middle of a stream
        return False
    answer_id, prompt, answer = served(response)
    verdict = {"score": 1} if correction is None else {"correction": correction}
    told = running.post("/v1/feedback", {"id": answer_id, **verdict}).json()
    assert told["usable"], told
    target = answer if correction is None else running.renderer.answer_ids(correction)
    row = trained(running, told["id"])
    assert row.input_ids == prompt + target
    assert row.labels == [IGNORED] * len(prompt) + target
    return True


text = st.text(st.sampled_from("ab \n\tüß漢🙂<|>{}\"'"), max_size=8)
part = st.one_of(text, st.builds(lambda value: {"type": "text", "text": value}, text))
content = st.one_of(text, text, st.lists(part, min_size=1, max_size=3))
call = st.builds(
    lambda arguments: {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}},
    st.sampled_from(['{"at": "Oslo"}', "{}", "", "[1]", "not json"]),
)
message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "assistant", "system", "developer"]), "content": content}
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.one_of(st.none(), text), "tool_calls": st.lists(call, max_size=2)}
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "content": content, "tool_call_id": st.just("c")}),
)
messages = st.one_of(
    st.lists(message, min_size=1, max_size=4),
    st.builds(lambda first, last: [first, {"role": "assistant", "content": "w"}, last], message, message),
    st.builds(lambda value: [{"role": "user", "content": value}], content),
)
ending = st.sampled_from(
    [{}, {}, {"add_generation_prompt": False}, {"continue_final_message": True, "add_generation_prompt": False}]
)
options = st.fixed_dictionaries(
    {},
    optional={
        "stream": st.booleans(),
        "n": st.integers(1, 2),
        "stream_options": st.just({"include_usage": True}),
        "truncate_prompt_tokens": st.sampled_from([-1, 1, 5, 40]),
        "echo": st.booleans(),
    },
).map(lambda made: made if made.get("stream") else {k: v for k, v in made.items() if k != "stream_options"})
chat = st.builds(
    lambda said, how, end, more: {"messages": said, **how, **end, **more},
    messages,
    options,
    ending,
    st.fixed_dictionaries(
        {},
        optional={
            "tools": st.just([WEATHER]),
            "tool_choice": st.just("none"),
            "chat_template_kwargs": st.sampled_from([{"enable_thinking": False}, {"enable_thinking": True}, {"x": 1}]),
            "reasoning_effort": st.sampled_from(["none", "low"]),
            "add_special_tokens": st.booleans(),
        },
    ),
)
completion = st.builds(
    lambda prompt, how: {"prompt": prompt, **how},
    st.one_of(
        text.filter(len), st.lists(st.integers(0, 250), min_size=1, max_size=9), text.filter(len).map(lambda t: [t])
    ),
    options,
)
correction = st.one_of(st.none(), st.sampled_from(["yes", "a\nb", "<tool_call>\n{}\n</tool_call>", "ü 漢"]))
many = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(chat, correction)
@many
def test_chat_trains_on_the_served_ids(running: Running, body: dict[str, Any], right: str | None) -> None:
    check(running, CHAT, body, right)


@given(completion, correction)
@many
def test_completions_train_on_the_served_ids(running: Running, body: dict[str, Any], right: str | None) -> None:
    check(running, COMPLETIONS, body, right)


def test_most_of_these_requests_were_answered(running: Running) -> None:
    assert running.statuses.count(200) >= len(running.statuses) / 2


@given(messages)
@many
def test_a_task_is_rendered_as_vllm_renders_it(running: Running, said: list[dict[str, Any]]) -> None:
    """Anchors and environment tasks were never served: rendered here, evaluated through the
    endpoint.
    """
    response = running.post(CHAT, {"messages": said, "temperature": 0, "max_tokens": 1, "return_token_ids": True})
    if response.status_code == 200:
        assert running.renderer.prompt_ids(said) == served(response)[1]


def test_an_answer_ends_as_the_template_ends_it(running: Running) -> None:
    (style,) = [name for name, (template, _) in STYLES.items() if template == running.renderer.tokenizer.chat_template]
    end = running.renderer.tokenizer.convert_tokens_to_ids(STYLES[style][1])
    assert running.renderer.answer_ids("ok")[-1] == end
    assert running.renderer.answer_ids(f"ok{STYLES[style][1]}") == running.renderer.answer_ids("ok"), "said once"
    assert running.server.gateway.engine.answer_ids("ok") == running.renderer.answer_ids("ok")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "ticket 1"}]}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hi"}]},
        {"messages": HISTORY},
        {"messages": HISTORY[:1], "tools": [WEATHER], "tool_choice": "none"},
        {"messages": HISTORY[:1], "chat_template_kwargs": {"enable_thinking": False}},
        {
            "messages": [*HISTORY[:1], {"role": "assistant", "content": "It r"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        {"messages": HISTORY[:1], "add_generation_prompt": False},
        {"messages": HISTORY[:1], "truncate_prompt_tokens": 4},
    ],
    ids=["parts", "developer", "tool calls", "tools", "no thinking", "continued", "no generation prompt", "truncated"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_requests_that_were_learnt_wrongly(
    request: pytest.FixtureRequest, qwen: Running, body: Any, stream: bool
) -> None:
    assert check(qwen, CHAT, {**body, "stream": stream}, "It rains.")
    assert check(qwen, CHAT, {**body, "stream": stream}, None)


@pytest.fixture(scope="module")
def qwen() -> Iterator[Running]:
    """As an operator of a tool-calling, reasoning model starts it."""
    started = Running(
        "qwen3", "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3",
        "--default-chat-template-kwargs", '{"enable_thinking": false}',
    )  # fmt: skip
    yield started
    started.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_of_tool_calls_is_learnt_as_the_model_made_it(qwen: Running, stream: bool) -> None:
    made = (
        '<think>\nOslo, then.\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"at": "Oslo"}}\n</tool_call>'
    )
    before, qwen.server.engine.answer = qwen.server.engine.answer, qwen.renderer.answer_ids(made)
    try:
        body = {
            "messages": HISTORY[:1], "tools": [WEATHER], "max_tokens": 500, "stream": stream,
            "chat_template_kwargs": {"enable_thinking": True},
        }  # fmt: skip
        response = qwen.post(CHAT, body)
        assert "tool_calls" in response.text
        assert "<tool_call>" not in response.text, "vLLM's parsers were at work"
        assert "token_ids" not in response.text.replace('"token_ids":null', "").replace('"prompt_token_ids":null', "")
        first = json.loads(response.text.removeprefix("data: ").splitlines()[0])
        told = qwen.post("/v1/feedback", {"id": first["id"], "score": 1}).json()
        row = trained(qwen, told["id"])
        assert row.input_ids[-len(qwen.server.engine.answer) :] == qwen.server.engine.answer
        assert row.labels[-len(qwen.server.engine.answer) :] == qwen.server.engine.answer
        assert check(qwen, CHAT, body, None)
    finally:
        qwen.server.engine.answer = before


def test_a_stop_string_and_a_cut_answer_get_no_end_of_turn(qwen: Running) -> None:
    """A verified answer is learnt as it was: the model did not end its turn there."""
    for stop in (("stop", "hi"), ("length", None)):
        qwen.server.engine.stop = stop
        try:
            assert check(qwen, CHAT, {"messages": HISTORY[:1]}, None)
        finally:
            qwen.server.engine.stop = ("stop", None)


@pytest.mark.parametrize(
    ("style", "arguments"),
    [
        ("chatml", ["--chat-template", "FILE"]),
        ("chatml", ["--chat-template=FILE"]),
        ("chatml", ["--chat_template", QWEN3.replace("\n", "")]),
        ("chatml", ["--chat-template", "FILE", "--default-chat-template-kwargs", '{"enable_thinking": false}']),
        ("chatml", ["--chat-template", "FILE", "--default-chat-template-kwargs.enable_thinking=false"]),
        ("chatml", ["--chat-template-content-format", "openai"]),
        ("parts", ["--chat-template-content-format=string"]),
    ],
)
def test_the_operators_own_template_is_learnt(
    request: pytest.FixtureRequest, tmp_path: Path, style: str, arguments: list[str]
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(QWEN3)
    running = start(request, style, *(argument.replace("FILE", str(file)) for argument in arguments))
    said = [{"role": "user", "content": "Rain?"}]
    response = running.post(CHAT, {"messages": said, "temperature": 0, "max_tokens": 1, "return_token_ids": True})
    prompt = served(response)[1]
    assert running.renderer.prompt_ids(said) == prompt
    assert check(running, CHAT, {"messages": said}, "It rains.")


def test_the_file_says_what_vllm_renders_with(request: pytest.FixtureRequest) -> None:
    for style, template, parts in (("chatml", CHATML, False), ("parts", PARTS, True)):
        running = start(request, style)
        chat_format = ChatFormat.read(running.data_dir)
        assert (chat_format.template, chat_format.parts) == (template, parts)
        assert chat_format.tokenizer == str(running.base)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_cannot_be_learnt_says_why_and_is_no_example(qwen: Running, stream: bool) -> None:
    several = qwen.post(COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2, "stream": stream})
    first = json.loads(several.text.removeprefix("data: ").splitlines()[0])
    before = qwen.server.gateway.store.counts()
    told = qwen.post("/v1/feedback", {"id": first["id"], "correction": "c"}).json()
    reason = "the answer came from several prompts or from beam search"
    assert (told["usable"], told["reason"]) == (False, reason)
    asked = qwen.post(CHAT, {"messages": HISTORY[:1], "max_tokens": 2, "stream": stream})
    first = json.loads(asked.text.removeprefix("data: ").splitlines()[0])
    long = qwen.post("/v1/feedback", {"id": first["id"], "correction": "x" * POSITIONS}).json()
    assert (long["usable"], long["reason"]) == (False, f"prompt and answer together have more than {POSITIONS} tokens")
    wrong = qwen.post("/v1/feedback", {"id": first["id"], "score": 0}).json()
    assert not wrong["usable"]
    assert "neither that the answer was right" in wrong["reason"]
    after = qwen.server.gateway.store.counts()
    assert after.examples == before.examples
    assert after.unusable[reason] == before.unusable.get(reason, 0) + 1


def test_capture_changes_nothing_of_what_the_client_reads(qwen: Running) -> None:
    for path, body in (
        (CHAT, {"messages": HISTORY, "n": 2}),
        (
            CHAT,
            {
                "messages": HISTORY,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            },
        ),
        (COMPLETIONS, {"prompt": ["a", "bc"], "echo": True}),
        (COMPLETIONS, {"prompt": "a", "stream": True, "echo": True, "return_token_ids": True}),
    ):
        seen = []
        for headers in ({}, {"x-lorikeet-capture": "off"}):
            response = qwen.post(path, {"max_tokens": 3, **body}, **headers)
            assert response.status_code == 200, response.text
            first = json.loads(response.text.removeprefix("data: ").splitlines()[0])
            seen.append(response.text.replace(first["id"], "ID").replace(str(first["created"]), "NOW"))
        assert seen[0] == seen[1]


async def test_a_client_that_goes_away_ends_its_generation(tmp_path: Path) -> None:
    """The recording around `generate` must pass the end on: else the engine goes on for nobody."""
    from edge_node.capture import SERVED, Served
    from edge_node.serving.internals import recorded
    from tests.fakes.vllm_server import CountingEngine

    class Parameters:
        output_kind, n, max_tokens = None, 1, 3

    ended: list[bool] = []

    async def generate(prompt: Any, sampling_params: Any, request_id: str) -> Any:
        try:
            for _ in range(9):
                output: Any = type("Output", (), {"prompt_token_ids": [1], "outputs": []})
                yield output
        finally:
            ended.append(True)

    assert CountingEngine.generate is not generate
    SERVED.set(Served())
    outputs = recorded(generate)({"type": "token", "prompt_token_ids": [1]}, Parameters(), "r")
    await anext(outputs)
    await outputs.aclose()
    assert ended == [True]
