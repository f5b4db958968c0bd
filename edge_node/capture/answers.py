"""From the raw bytes of a finished answer to an interaction.

In: the parsed request and the body as it went to the client, JSON or server-sent events. Out: an Interaction, or None
for an answer that is no text interaction. Raises ValueError or its kin when the bytes are not what vLLM sends. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_node.experience import Interaction


@dataclass(frozen=True)
class Finished:
    """One finished 200 answer. body: its bytes in pieces; streamed: server-sent events instead of one JSON document."""

    endpoint: str
    request: dict[str, Any]
    body: list[bytes]
    streamed: bool
    created_at: str


def to_interaction(finished: Finished) -> Interaction | None:
    """The interaction in `finished`; None when it has no text prompt or did not come to its end."""
    messages = _messages(finished.request)
    if messages is None:
        return None
    body = b"".join(finished.body)
    parts = list(_events(body)) if finished.streamed else [json.loads(body)]
    if not parts or any("error" in part for part in parts):
        return None
    text, finish_reason = _first_choice(parts)
    if finish_reason is None:
        return None
    prompt = finished.request.get("prompt")
    if finished.request.get("echo") and isinstance(prompt, str):
        text = text.removeprefix(prompt)
    return Interaction(
        id=str(parts[0]["id"]),
        created_at=finished.created_at,
        model=str(parts[0]["model"]),
        messages=messages,
        answer=text,
        finish_reason=finish_reason,
        endpoint=finished.endpoint,
    )


def _messages(request: dict[str, Any]) -> list[dict[str, Any]] | None:
    if isinstance(request.get("messages"), list):
        return list(request["messages"])
    prompt = request.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    return [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else None


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
