"""Requests that were once learnt wrongly, tool calls, cut answers, and what cannot be learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_node.experience import Choice
from tests.contract.served_ids.running import (
    CHAT,
    COMPLETIONS,
    HISTORY,
    WEATHER,
    Running,
    check,
    trained,
)
from tests.fakes.chat_templates import POSITIONS
from tests.fakes.vllm_server import VERSION

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "ticket 1"}]}]},
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "hi"},
            ]
        },
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
    ids=[
        "parts",
        "developer",
        "tool calls",
        "tools",
        "no thinking",
        "continued",
        "no generation prompt",
        "truncated",
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_the_requests_that_were_learnt_wrongly(
    request: pytest.FixtureRequest, qwen: Running, body: Any, stream: bool
) -> None:
    assert check(qwen, CHAT, {**body, "stream": stream}, "It rains.")
    assert check(qwen, CHAT, {**body, "stream": stream}, None)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_an_answer_of_tool_calls_is_learnt_as_the_model_made_it(
    qwen: Running, stream: bool
) -> None:
    made = (
        "<think>\nOslo, then.\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"at": "Oslo"}}\n</tool_call>'
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
        assert "token_ids" not in response.text.replace('"token_ids":null', "").replace(
            '"prompt_token_ids":null', ""
        )
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
    assert (long["usable"], long["reason"]) == (
        False,
        f"prompt and answer together have more than {POSITIONS} tokens",
    )
    so_so = qwen.post("/v1/feedback", {"id": first["id"], "score": 0.6}).json()
    assert not so_so["usable"]
    assert "neither that the answer was right" in so_so["reason"]
    after = qwen.server.gateway.store.counts()
    assert after.examples == before.examples
    assert after.unusable[reason] == before.unusable.get(reason, 0) + 1


def test_capture_changes_nothing_of_what_the_client_reads(qwen: Running) -> None:
    for path, body in (
        (CHAT, {"messages": HISTORY, "n": 2}),
        (CHAT, {"messages": HISTORY, "n": 2, "stream": True}),
        (CHAT, {"messages": HISTORY, "n": 2, "logprobs": True, "top_logprobs": 1}),
        (COMPLETIONS, {"prompt": "a", "n": 2, "return_token_ids": True}),
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
            seen.append(
                response.text.replace(first["id"], "ID").replace(str(first["created"]), "NOW")
            )
        assert seen[0] == seen[1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("asked", [{}, {"logprobs": True, "top_logprobs": 1}], ids=str)
def test_choices_are_kept_as_served_and_can_be_compared(
    qwen: Running, stream: bool, asked: dict[str, Any]
) -> None:
    body = {"messages": HISTORY[:1], "n": 3, "max_tokens": 2, "stream": stream, **asked}
    text = qwen.post(CHAT, body).text
    answer_id = json.loads(text.removeprefix("data: ").splitlines()[0])["id"]
    store, engine = qwen.server.gateway.store, qwen.server.engine
    kept = store.interaction(answer_id)
    assert kept is not None
    assert kept.choices == tuple(
        Choice(
            tuple(token + index for token in engine.answer[:2]),
            tuple(-token / 64 - index for token in engine.answer[:2]),
        )
        for index in range(3)
    )
    scored = qwen.post("/v1/feedback", {"id": answer_id, "scores": [0, 1, 2]}).json()
    assert (scored["interaction"], scored["usable"]) == (answer_id, True)
    (group, *_) = store.groups(up_to=store.cursor(), limit=9, model=VERSION)
    assert (group.prompt_ids, group.scores) == (kept.prompt_ids, (0.0, 1.0, 2.0))
    told = qwen.post("/v1/feedback", {"id": answer_id, "chosen": 2, "rejected": 1}).json()
    assert (told["interaction"], told["usable"]) == (answer_id, True)
    (pair, *_) = store.pairs(up_to=store.cursor(), limit=9)
    assert (pair.chosen_ids, pair.rejected_ids) == (
        kept.choices[2].answer_ids,
        kept.choices[1].answer_ids,
    )
    other = json.loads(qwen.post(CHAT, {"messages": HISTORY[:1], "max_tokens": 3}).text)["id"]
    told = qwen.post("/v1/feedback", {"chosen": other, "rejected": answer_id}).json()
    assert (told["interaction"], told["usable"]) == (other, True)
    refused = [
        qwen.post("/v1/feedback", body).status_code
        for body in (
            {"id": answer_id, "scores": [0, 1]},
            {"id": answer_id, "chosen": 3, "rejected": 1},
            {"chosen": "nobody", "rejected": answer_id},
        )
    ]
    assert refused == [400, 400, 404]


async def test_a_client_that_goes_away_ends_its_generation(tmp_path: Path) -> None:
    """The recording around `generate` must pass the end on: else the engine goes on for nobody."""
    from edge_node.capture import SERVED, Served
    from edge_node.serving.recording import recorded
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
