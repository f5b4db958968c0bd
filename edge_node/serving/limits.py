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
from edge_node.serving.routes import (
    CHAT,
    DETOKENIZE,
    MESSAGES,
    RESPONSES,
    SCORING,
    TEXT,
    TOKENIZE,
)
from edge_node.serving_settings import LimitsSettings

SETTING = "EDGE_SERVING__LIMITS__"
TOKENS = ("max_completion_tokens", "max_tokens")
LENGTHS = {
    CHAT: TOKENS,
    TEXT: ("max_tokens",),
    RESPONSES: ("max_output_tokens",),
    MESSAGES: ("max_tokens",),
}
"""Route -> fields that say how long an answer may be, the first one before the others."""
TEXT_TOKENS = 16
"""What vLLM gives a request to /v1/completions without `max_tokens`; `null` is the context."""


def length_fields(path: str) -> tuple[str, ...]:
    """The fields of a route of answers that say how long one may be.

    /v1/completions ignores `max_completion_tokens`.
    """
    return LENGTHS[path]


def bound(
    path: str, request: dict[str, Any], limits: LimitsSettings, context: int, longest_text: int
) -> None:
    """Raises Unreadable for a request to the route `path` beyond `limits`.

    One for which vLLM would take the context's length gets the largest of `limits`, where that is
    shorter than `context`, the longest that the model has.

    Args:
        longest_text: most characters that `context` tokens can have.
    """
    if path in (TOKENIZE, DETOKENIZE):
        _bound_counting(request, context, longest_text)
        return
    if path == SCORING:
        _bound_scoring(request, limits)
        return
    for field in ("n", "best_of"):
        _expect(request, field, limits.choices, "choices")
    prompts = count_prompts(request.get("prompt")) + count_prompts(request.get("prompt_embeds"))
    if prompts > limits.prompts:
        raise _beyond("prompt", f"has {prompts} prompts", limits.prompts, "prompts")
    answers = max(prompts, 1) * max(_number(request.get("n")) or 1, 1)
    if answers > limits.answers:
        text = f"is {repr(request.get('n'))} for each of {max(prompts, 1)} prompts: {answers:g}"
        raise _beyond("n", f"{text} answers", limits.answers, "answers")
    if limits.max_tokens is None or path not in LENGTHS:
        return
    fields = length_fields(path)
    for field in {*TOKENS, *fields}:
        _expect(request, field, limits.max_tokens, "max_tokens")
    if path == MESSAGES:  # where the field is required
        return
    if path == TEXT and limits.max_tokens >= TEXT_TOKENS:
        request.setdefault("max_tokens", TEXT_TOKENS)
    if all(request.get(field) is None for field in fields) and limits.max_tokens < context:
        request[fields[-1]] = limits.max_tokens


def longest_prompt(request: dict[str, Any], limits: LimitsSettings) -> int | None:
    """Most tokens that the engine may be given for one prompt of the request; None: no bound."""
    if limits.prompt_tokens is None or not request.get("use_beam_search"):
        return limits.prompt_tokens
    answer = request.get("max_tokens")  # beam search gives the engine what it has written so far
    return limits.prompt_tokens + answer if isinstance(answer, int) else None


def _bound_counting(request: dict[str, Any], context: int, longest_text: int) -> None:
    """What no prompt can be is not counted either: it would hold up everybody's prompts."""
    prompt, tokens = request.get("prompt"), request.get("tokens")
    if isinstance(prompt, str) and len(prompt) > longest_text:
        text = f"prompt has {len(prompt)} characters; a prompt of this model has at most "
        raise Unreadable(
            f"{text}{longest_text}, in {context} tokens. Send a shorter one.", "prompt"
        )
    if isinstance(tokens, list) and len(tokens) > context:
        text = f"tokens has {len(tokens)} tokens; the model takes {context}. Send fewer."
        raise Unreadable(text, "tokens")


def _bound_scoring(request: dict[str, Any], limits: LimitsSettings) -> None:
    for field in ("items", "label_token_ids"):
        value = request.get(field)
        if isinstance(value, list) and len(value) > limits.prompts:
            raise _beyond(field, f"has {len(value)} entries", limits.prompts, "prompts")


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
