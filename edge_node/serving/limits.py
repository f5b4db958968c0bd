"""Bounds of one completion request, so that it starves nobody else.

In: the parsed body of a client, and the settings. Out: nothing, or an Unreadable that names the
field, the value and the setting. Guarantees: a value that vLLM would take for a number is seen as
one; what it would take for none is left to vLLM's own 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr  # the value seen, cut short
from typing import Any

from edge_node.serving.refusals import Unreadable
from edge_node.serving_settings import LimitsSettings

SETTING = "EDGE_SERVING__LIMITS__"
TOKENS = ("max_completion_tokens", "max_tokens")
TEXT_TOKENS = 16
"""What vLLM gives a request to /v1/completions without `max_tokens`; `null` is the context."""


def length_fields(path: str) -> tuple[str, ...]:
    """The fields of a route that say how long an answer may be, the first one before the others.

    /v1/completions ignores `max_completion_tokens`.
    """
    return TOKENS if path.endswith("/chat/completions") else ("max_tokens",)


def bound(path: str, request: dict[str, Any], limits: LimitsSettings, context: int) -> None:
    """Raises Unreadable for a request to the route `path` beyond `limits`.

    One for which vLLM would take the context's length gets the largest of `limits`, where that is
    shorter than `context`, the longest that the model has.
    """
    for field in ("n", "best_of"):
        _expect(request, field, limits.choices, "choices")
    prompts = count_prompts(request.get("prompt")) + count_prompts(request.get("prompt_embeds"))
    if prompts > limits.prompts:
        raise _beyond("prompt", f"has {prompts} prompts", limits.prompts, "prompts")
    answers = max(prompts, 1) * max(_number(request.get("n")) or 1, 1)
    if answers > limits.answers:
        text = f"is {repr(request.get('n'))} for each of {max(prompts, 1)} prompts: {answers:g}"
        raise _beyond("n", f"{text} answers", limits.answers, "answers")
    if limits.max_tokens is None:
        return
    fields = length_fields(path)
    for field in TOKENS:
        _expect(request, field, limits.max_tokens, "max_tokens")
    if fields != TOKENS and limits.max_tokens >= TEXT_TOKENS:
        request.setdefault("max_tokens", TEXT_TOKENS)
    if all(request.get(field) is None for field in fields) and limits.max_tokens < context:
        request["max_tokens"] = limits.max_tokens


def _expect(request: Mapping[str, Any], field: str, most: int, setting: str) -> None:
    value = request.get(field)
    if (number := _number(value)) is not None and number > most:
        raise _beyond(field, f"is {repr(value)}", most, setting)


def _beyond(field: str, seen: str, most: int, setting: str) -> Unreadable:
    return Unreadable(
        f"{field} {seen}; this node takes at most {most} ({SETTING}{setting.upper()}). Send a "
        "smaller request, or several.",
        field,
    )


def _number(value: Any) -> float | None:
    """As vLLM's own check reads it: `"8"` and 8.0 are 8."""
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def count_prompts(prompt: Any) -> int:
    """How many prompts: a list of token ids is one, a list of anything else is as many."""
    if prompt is None:
        return 0
    if not isinstance(prompt, list) or not prompt or isinstance(prompt[0], int | float):
        return 1
    return len(prompt)
