from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from edge_node.capture import (
    Finished,
    Generation,
    Made,
    Served,
    to_interaction,
)
from edge_node.experience import Choice, Interaction
from edge_node.experience.usable import ABORTED

CHAT = {"model": "lorikeet@v1", "messages": [{"role": "user", "content": "hi"}]}


def make_served(prompts: int = 1, *, text_only: bool = True) -> Served:
    return Served([Generation(text_only, [5, 6 + number], [7, 2]) for number in range(prompts)])


def make_chat(
    answer_id: str = "chatcmpl-1",
    request: dict[str, Any] | None = None,
    served: Served | None = None,
    **choice: Any,
) -> Finished:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hello"},
        "finish_reason": "stop",
    } | choice
    body = json.dumps({"id": answer_id, "model": "lorikeet@v1", "choices": [choice]}).encode()
    pieces = [body[:10], body[10:]]
    return Finished(
        "/v1/chat/completions", request or CHAT, pieces, False, "now", served or make_served()
    )


def make_stream(*chunks: dict[str, Any] | str) -> Finished:
    lines = [
        chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}\n\n" for chunk in chunks
    ]
    raw = "".join([*lines, "data: [DONE]\n\n"]).encode()
    pieces = [raw[start : start + 7] for start in range(0, len(raw), 7)]
    return Finished("/v1/chat/completions", CHAT, pieces, True, "now", make_served())


def chunk(text: str | None = None, finish: str | None = None, index: int = 0) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    return {
        "id": "chatcmpl-2",
        "model": "lorikeet@v1",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish}],
    }


def test_a_body_becomes_an_interaction() -> None:
    assert to_interaction(make_chat()) == Interaction(
        "chatcmpl-1", "now", "lorikeet@v1", CHAT["messages"], "hello", "stop",
        "/v1/chat/completions", prompt_ids=(5, 6), answer_ids=(7, 2),
    )  # fmt: skip


def test_a_stream_becomes_the_same_interaction_however_it_was_cut() -> None:
    usage = {"id": "chatcmpl-2", "model": "lorikeet@v1", "choices": [], "usage": {}}
    finished = make_stream(
        chunk(""),
        chunk("hel"),
        ": keep-alive\n\n",
        chunk("other", index=1),
        chunk("lo\n\nü"),
        chunk(finish="length"),
        usage,
    )
    interaction = to_interaction(finished)
    assert interaction is not None
    assert (interaction.id, interaction.answer, interaction.finish_reason) == (
        "chatcmpl-2",
        "hello\n\nü",
        "length",
    )
    assert (interaction.prompt_ids, interaction.answer_ids) == ((5, 6), (7, 2))


@pytest.mark.parametrize("prompt", ["1 2", ["1 2"], [1, 2], [[1, 2]]], ids=str)
def test_a_prompt_is_kept_as_a_message(prompt: Any) -> None:
    finished = make_chat(request={"prompt": prompt, "echo": False}, message=None, text=" 3")
    interaction = to_interaction(finished)
    assert interaction is not None
    assert interaction.messages == [{"role": "prompt", "content": prompt}]
    assert (interaction.answer, interaction.prompt_ids, interaction.unusable) == (" 3", (5, 6), "")


@pytest.mark.parametrize(
    ("request_", "served", "reason"),
    [
        (
            {"prompt": ["a", "b"]},
            make_served(2),
            "the answer came from several prompts or from beam search",
        ),
        (
            {**CHAT, "use_beam_search": True},
            make_served(),
            "the answer came from several prompts or from beam search",
        ),
        (CHAT, make_served(text_only=False), "the prompt holds more than text"),
    ],
    ids=["several prompts", "beam search", "images"],
)
def test_an_interaction_that_nothing_can_be_learnt_from_says_why(
    request_: dict[str, Any], served: Served, reason: str
) -> None:
    interaction = to_interaction(make_chat(request=request_, served=served))
    assert interaction is not None
    assert (interaction.prompt_ids, interaction.answer_ids, interaction.unusable) == (
        (),
        (),
        reason,
    )


def test_all_choices_of_a_request_are_kept_by_index() -> None:
    made = {1: Made([8, 2], [-0.5, -0.25]), 0: Made([7, 2], [-1.0, -2.0])}
    served = Served([Generation(True, [5, 6], [7, 2], made)])
    interaction = to_interaction(make_chat(served=served))
    assert interaction is not None
    assert interaction.answer_ids == (7, 2)
    assert interaction.choices == (Choice((7, 2), (-1.0, -2.0)), Choice((8, 2), (-0.5, -0.25)))
    made[2] = made.pop(1)
    lost = to_interaction(make_chat(served=served))
    assert lost is not None
    assert lost.choices == (), "a score must mean the answer that was read"


def test_a_token_that_nobody_was_shown_is_no_part_of_the_answer() -> None:
    request = {"prompt": "1 2", "echo": True, "max_tokens": 0}
    interaction = to_interaction(make_chat(request=request, message=None, text="1 2"))
    assert interaction is not None
    assert (interaction.answer, interaction.prompt_ids, interaction.answer_ids) == ("", (5, 6), ())


def test_an_echoed_prompt_is_no_part_of_the_answer() -> None:
    interaction = to_interaction(
        make_chat(request={"prompt": "1 2", "echo": True}, message=None, text="1 2 3")
    )
    assert interaction is not None
    assert interaction.answer == " 3"


@pytest.mark.parametrize(
    "finished",
    [
        make_stream(chunk("a"), {"error": {"message": "engine died"}}),
        make_stream(chunk("a")),
    ],
    ids=["error in the stream", "no end"],
)
def test_what_did_not_come_to_its_end_is_skipped(finished: Finished) -> None:
    assert to_interaction(finished) is None


def test_a_stream_that_its_client_left_holds_its_whole_events() -> None:
    whole = make_stream(chunk("a"), chunk("b"))
    cut = dataclasses.replace(whole, body=[b"".join(whole.body)[:-8]], aborted=True)
    interaction = to_interaction(cut)
    assert interaction is not None
    assert (interaction.answer, interaction.finish_reason) == ("ab", "abort")
    assert interaction.unusable == ABORTED
    assert interaction.prompt_ids == (5, 6)
    for endpoint in (cut.endpoint, "/v1/responses", "/v1/messages"):
        request = CHAT | {"input": "hi"}
        cut = dataclasses.replace(cut, endpoint=endpoint, request=request, body=[b"data: {"])
        assert to_interaction(cut) is None
