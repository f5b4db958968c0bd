"""Requests made from vLLM's own schema, a few at a time, against a real engine on CPU.

In: the JSON schema of every route of a model, and values that no schema allows. Out: two oracles.
The vLLM that was started still makes tokens, and no request is answered with a 5xx.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.integration.serving_node import CHAT, COMPLETIONS, ServingNode, serving_node

pytestmark = [pytest.mark.timeout(580), pytest.mark.slow]

EXAMPLES = 800
RESPONSES, MESSAGES, SCORING = "/v1/responses", "/v1/messages", "/generative_scoring"
TOKENIZE, DETOKENIZE, COUNT_TOKENS = "/tokenize", "/detokenize", "/v1/messages/count_tokens"
NUMBERS = [
    0,
    1,
    2,
    3,
    -1,
    -2,
    20,
    21,
    246,
    247,
    2**31,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    0.0,
    -0.0,
    0.5,
    1.5,
    2.0,
    1e308,
    -1e308,
    5e-324,
    2**70,
    -(2**70),
    float("nan"),
    float("-inf"),
    float("inf"),
]
TEXTS = [
    "\ud800",
    "",
    "w1",
    "w1 w2 w3",
    " ",
    "w999 é \x00",
    "<s> </s>",
    "(w1|w2)+",
    "(",
    "root ::= root",
    "{}",
    "true",
    "1",
    "0.0",
    "json_object",
    "left",
    "\\p{Greek}",
    'start: "a"',
    "²",
    "[[[[",
]
DEEP: Any = []
for _ in range(150):
    DEEP = [DEEP]
MAX_TOKENS = "max_tokens", "max_completion_tokens", "max_output_tokens"
SAID = [{"role": "user", "content": "w1 w2"}]
BODIES: dict[str, list[dict[str, Any]]] = {
    COMPLETIONS: [
        {"prompt": prompt} for prompt in ("w1 w2 w3", ["w1 w2", "w3"], [5, 6, 7], [[8, 9], [10]])
    ],
    CHAT: [{"messages": SAID}],
    RESPONSES: [{"input": "w1 w2"}, {"input": SAID}],
    MESSAGES: [{"messages": SAID}],
    COUNT_TOKENS: [{"messages": SAID}],
    TOKENIZE: [{"prompt": "w1 w2"}, {"messages": SAID}],
    DETOKENIZE: [{"tokens": [5, 6]}],
    SCORING: [
        {"query": "w1", "items": ["w2", "w3"], "label_token_ids": [7, 8]},
        {"query": [5], "items": [[6], [7]], "label_token_ids": [7]},
    ],
}
"""Route -> requests that it answers, without how long an answer may be."""
SMALL = {
    COMPLETIONS: {"max_tokens": 3},
    CHAT: {"max_tokens": 3},
    MESSAGES: {"max_tokens": 3},
    RESPONSES: {"max_output_tokens": 3},
}
JSON = {"content-type": "application/json"}


def schemas() -> dict[str, dict[str, Any]]:
    """As vLLM publishes them in its OpenAPI document, which the node does not serve."""
    from vllm.entrypoints.anthropic.protocol import (
        AnthropicCountTokensRequest,
        AnthropicMessagesRequest,
    )
    from vllm.entrypoints.generate.generative_scoring.serving import GenerativeScoringRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest

    return {
        COMPLETIONS: CompletionRequest.model_json_schema(),
        CHAT: ChatCompletionRequest.model_json_schema(),
        RESPONSES: ResponsesRequest.model_json_schema(),
        MESSAGES: AnthropicMessagesRequest.model_json_schema(),
        COUNT_TOKENS: AnthropicCountTokensRequest.model_json_schema(),
        TOKENIZE: TokenizeChatRequest.model_json_schema(),
        DETOKENIZE: DetokenizeRequest.model_json_schema(),
        SCORING: GenerativeScoringRequest.model_json_schema(),
    }


def anything() -> st.SearchStrategy[Any]:
    leaf = st.one_of(st.none(), st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS))
    return st.one_of(
        leaf,
        st.lists(leaf, max_size=3),
        st.dictionaries(st.sampled_from(TEXTS), leaf, max_size=2),
        st.just(DEEP),
        st.sampled_from([["w1"] * 10_000, [5] * 10_000]),
    )


def values(
    schema: dict[str, Any], definitions: dict[str, Any], depth: int = 4
) -> st.SearchStrategy[Any]:
    """Values of a JSON schema; numbers outside of its bounds too, because clients send them."""
    if depth == 0:
        return anything()
    if "$ref" in schema:
        return values(definitions[schema["$ref"].rpartition("/")[2]], definitions, depth - 1)
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in schema:
            return st.one_of([values(each, definitions, depth) for each in schema[choice]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "object":
            return objects(schema, definitions, depth - 1)
        case "array":
            return st.lists(values(schema.get("items", {}), definitions, depth - 1), max_size=3)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "string":
            return st.sampled_from(TEXTS)
        case "integer":
            return st.sampled_from([number for number in NUMBERS if isinstance(number, int)])
        case "number":
            return st.sampled_from(NUMBERS)
    return anything()


def objects(
    schema: dict[str, Any], definitions: dict[str, Any], depth: int
) -> st.SearchStrategy[Any]:
    properties = schema.get("properties", {})
    if not properties:
        inner = schema.get("additionalProperties")
        keys = st.sampled_from([*TEXTS, *map(str, (0, 1, 246, 247))])
        return st.dictionaries(
            keys,
            values(inner, definitions, depth) if isinstance(inner, dict) else anything(),
            max_size=2,
        )
    fields = {name: values(each, definitions, depth) for name, each in properties.items()}
    required = {name: fields[name] for name in schema.get("required", ())}
    optional = {name: each for name, each in fields.items() if name not in required}
    return st.fixed_dictionaries(required, optional=dict(list(optional.items())[:8]))


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A good request with one to four drawn fields: two thirds as the schema says."""
    path = draw(st.sampled_from([COMPLETIONS, CHAT, RESPONSES, MESSAGES, *BODIES]))
    schema, definitions = SCHEMAS[path], SCHEMAS[path].get("$defs", {})
    body: dict[str, Any] = dict(draw(st.sampled_from(BODIES[path])))
    names = st.lists(
        st.sampled_from(sorted(set(schema["properties"]) - {"model", "request_id", "user"})),
        min_size=1,
        max_size=4,
    )
    for name in draw(names):
        as_it_says = draw(st.sampled_from([True, True, False]))
        body[name] = draw(
            values(schema["properties"][name], definitions) if as_it_says else anything()
        )
    # How long an answer is and how many there are is load, not a kind of request.
    if body.get("n") not in (None, 1, 2, 3):
        body["n"] = draw(st.sampled_from([0, -1, "2", 2.0, True, 2**63]))
    small = {
        name: body[name] for name in MAX_TOKENS if body.get(name) in (0, 1, 2, 3, -1, "1", 2**64)
    }
    return path, {name: value for name, value in body.items() if name not in MAX_TOKENS} | (
        small or SMALL.get(path, {})
    )


SCHEMAS = schemas()


@pytest.mark.usefixtures("one_thread")
async def test_no_request_ends_the_engine() -> None:
    async with serving_node({1: 4, 2: 2, 3: 8, 4: 1}) as node:
        loop = asyncio.get_running_loop()
        seen: dict[int, int] = {}
        ended: list[str] = []
        failed: list[str] = []

        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(st.lists(st.tuples(requests(), st.integers(0, 4)), min_size=2, max_size=5))
        def fuzz(batch: list[tuple[tuple[str, dict[str, Any]], int]]) -> None:
            # Not an assertion: hypothesis would go on with a dead engine and report another batch.
            if not ended and not asyncio.run_coroutine_threadsafe(
                send(node, batch, seen, failed), loop
            ).result(120):
                ended.append(json.dumps([request for request, _ in batch]))

        await asyncio.to_thread(fuzz)
        assert ended == [], "the engine ended after these requests"
        print("answers by status:", dict(sorted(seen.items())))
        assert failed == [], "these requests were answered with a 5xx"
        assert seen.get(200, 0) > EXAMPLES // 4, (
            "most requests must reach the engine for this test to mean anything"
        )


async def send(
    node: ServingNode,
    batch: list[tuple[tuple[str, dict[str, Any]], int]],
    seen: dict[int, int],
    failed: list[str],
) -> bool:
    """All at once, so that they share steps; True when the same engine makes a token after them."""
    models = [node.base, *node.versions]
    posts = [
        node.http.post(
            path, content=json.dumps(body | {"model": models[number]}), headers=JSON
        )  # escapes, and NaN
        for (path, body), number in batch
    ]
    answers = await asyncio.gather(*posts, return_exceptions=True)
    for ((path, body), _), answer in zip(batch, answers, strict=True):
        if isinstance(answer, httpx.Response):
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            if answer.status_code >= 500:
                failed.append(f"{path} {json.dumps(body)[:300]}: {answer.text[:300]}")
    # Over the control socket: after a 500 uvicorn closes the connection, which says nothing of the
    # engine.
    return await node.control.probe(60) and node.vllm.generation == 1


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
