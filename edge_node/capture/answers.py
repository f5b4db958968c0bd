"""From the raw bytes of a finished answer to an interaction.

In: the parsed request, the body as it went to the client (JSON or server-sent events), and the
token ids that the engine had. Out: an Interaction, or None for an answer that ended with an error.
Raises ValueError or its kin when the bytes are not what vLLM sends. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_node.capture.apis import LEFT, as_chat
from edge_node.capture.served import Generation, Served
from edge_node.experience import Choice, Interaction
from edge_node.experience.usable import ABORTED, NOT_ONE_PROMPT, NOT_ONLY_TEXT


@dataclass(frozen=True)
class Finished:
    """One finished 200 answer. body: its bytes in pieces. streamed: they are server-sent events.

    user: of the access key that it was asked with, if that has one. episode, environment: as the
    client named them. aborted: the client went away before the end.
    """

    endpoint: str
    request: dict[str, Any]
    body: list[bytes]
    streamed: bool
    created_at: str
    served: Served
    user: str | None = None
    episode: str | None = None
    environment: str | None = None
    aborted: bool = False


def to_interaction(finished: Finished) -> Interaction | None:
    """The interaction in `finished`; None when it did not come to its end."""
    body = b"".join(finished.body)
    if finished.aborted:
        body = body[: body.rfind(b"\n\n") + 1]  # whole events
    sent = list(_events(body)) if finished.streamed else [json.loads(body)]
    request, parts = as_chat(finished.endpoint, finished.request, sent, aborted=finished.aborted)
    if not parts or any("error" in part for part in parts):
        return None
    text, finish_reason = _first_choice(parts)
    if finished.aborted:
        finish_reason = LEFT
    if finish_reason is None:
        return None
    prompt = request.get("prompt")
    if request.get("echo") and isinstance(prompt, str):
        text = text.removeprefix(prompt)
    prompt_ids, answer_ids, choices, unusable = _ids(finished)
    return Interaction(
        id=str(parts[0]["id"]),
        created_at=finished.created_at,
        model=str(parts[0]["model"]),
        messages=_messages(request),
        answer=text,
        finish_reason=finish_reason,
        endpoint=finished.endpoint,
        prompt_ids=prompt_ids,
        answer_ids=answer_ids,
        unusable=ABORTED if finished.aborted else unusable,
        choices=choices,
        user=finished.user,
        episode=finished.episode,
        environment=finished.environment,
    )


def _ids(
    finished: Finished,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Choice, ...], str]:
    """Ids of prompt, answer and choices, and why nothing can be learnt from them."""
    generations = finished.served.generations
    if len(generations) != 1 or finished.request.get("use_beam_search"):
        return (), (), (), NOT_ONE_PROMPT
    (generation,) = generations
    if not generation.text_only:
        return (), (), (), NOT_ONLY_TEXT
    prompt = tuple(generation.prompt_ids)
    # Asked for none, vLLM makes one token all the same and shows it to nobody.
    if finished.request.get("max_tokens") == 0:
        return prompt, (), (), ""
    return prompt, tuple(generation.answer_ids), _choices(generation), ""


def _choices(generation: Generation) -> tuple[Choice, ...]:
    """By index; none where an index is missing: scores must mean the answers that were read."""
    made = [generation.choices.get(index) for index in range(len(generation.choices))]
    return (
        ()
        if None in made
        else tuple(Choice(tuple(one.answer_ids), tuple(one.logprobs)) for one in made if one)
    )


def _messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    """As the client sent them; a prompt of /v1/completions is one message of role `prompt`."""
    messages = request.get("messages")
    return (
        list(messages)
        if isinstance(messages, list)
        else [{"role": "prompt", "content": request.get("prompt")}]
    )


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)


def _first_choice(parts: list[dict[str, Any]]) -> tuple[str, str | None]:
    text: list[str] = []
    finish_reason = None
    for part in parts:
        for choice in part.get("choices", ()):
            if choice.get("index", 0) != 0:
                continue
            message = choice.get("message") or choice.get("delta") or choice
            text.append(message.get("content") or message.get("text") or "")
            finish_reason = choice.get("finish_reason") or finish_reason
    return "".join(text), finish_reason
