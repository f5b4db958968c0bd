"""The body of POST /v1/feedback.

In: bytes. Out: a Feedback, an EpisodeFeedback, a Preference or Scores. Guarantees: a ValueError
names field, value seen and what was expected.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from reprlib import repr  # the value seen, cut short
from typing import Any, Literal

from edge_node.experience import Answer, EpisodeFeedback, Feedback, Preference, Said, Scores

FIELDS = ("id", "thumb", "score", "correction", "tool_calls", "comment")
OF_EPISODE = ("episode", "thumb", "score", "comment")
COMPARING = ("id", "chosen", "rejected", "scores")
"""Fields of a preference or of scores; they do not go with those of a verdict."""
EXPECTED = (
    'Expected {"id": "<id of an answer>"} with at least one of "thumb" ("up" or "down"), '
    '"score" (0 to 1), "correction", "tool_calls" and "comment"; or {"episode": "<x-lorikeet-'
    'episode>"} with "thumb", "score" or "comment"; or {"chosen": "<id>", "rejected": "<id>"}; or '
    'with an id and two of its choices {"id": "<id>", "chosen": 0, "rejected": 1}; or with a score '
    'for each choice {"id": "<id>", "scores": [0.2, 1]}.'
)
LARGEST_SCORE = 1e6
"""Scores of a group are finite and no further from 0: their spread must be finite in float32."""
OF = dict.fromkeys(("id", "chosen", "rejected"), "the `id` of an answer") | {
    "episode": "the value of the header x-lorikeet-episode of the requests"
}
THUMBS = {"up": 1.0, "down": 0.0}
MOST_CALLS = 64
FUNCTION = r"^[A-Za-z0-9_.:/-]{1,128}$"
"""What a function may be called."""
CALLS: Literal["tool_calls"] = "tool_calls"


def read_feedback(body: bytes) -> Said:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is not JSON ({error}). {EXPECTED}") from None
    if not isinstance(document, dict):
        raise ValueError(f"The body is a JSON {type(document).__name__}. {EXPECTED}")
    compares = [name for name in COMPARING if name != "id" and document.get(name) is not None]
    of_episode = document.get("episode") is not None
    fields = COMPARING if compares else OF_EPISODE if of_episode else FIELDS
    if unknown := sorted(set(document) - set(fields)):
        place = " of what is said of an episode" if fields is OF_EPISODE else ""
        raise ValueError(f"Unknown field {repr(unknown[0])}{place}; expected {', '.join(fields)}.")
    if compares == ["scores"]:
        return Scores(_id(document, "id"), _scores(document["scores"]))
    if compares:
        return _preference(document, compares)
    score, thumb = _score(document.get("score")), _thumb(document.get("thumb"))
    if score is not None and thumb is not None:
        raise ValueError(f"The feedback has thumb and score; expected one of them. {EXPECTED}")
    form: Literal["", "thumb"] = "" if thumb is None else "thumb"
    score = score if thumb is None else thumb
    comment = _text(document, "comment")
    said: Said
    if of_episode:
        said = EpisodeFeedback(_id(document, "episode"), score, comment, form)
        says_nothing = score is None and comment is None
    else:
        correction, calls = _text(document, "correction"), _calls(document.get("tool_calls"))
        if correction is not None and calls is not None:
            raise ValueError(
                "The feedback has correction and tool_calls; expected one of them: a correction "
                "in the model's own format may hold both text and calls."
            )
        of_answer = Feedback(_id(document, "id"), score, correction, comment, (), form)
        said = of_answer if calls is None else replace(of_answer, correction=calls, form=CALLS)
        says_nothing = score is None and said.correction is None and comment is None
    if says_nothing:
        raise ValueError(f"The feedback says nothing. {EXPECTED}")
    return said


def _preference(document: dict[str, Any], compares: list[str]) -> Preference:
    if compares != ["chosen", "rejected"]:
        raise ValueError(f"The feedback has {' and '.join(compares)}. {EXPECTED}")
    if document.get("id") is None:
        return Preference(Answer(_id(document, "chosen")), Answer(_id(document, "rejected")))
    interaction_id = _id(document, "id")
    chosen, rejected = (
        Answer(interaction_id, _index(document, name)) for name in ("chosen", "rejected")
    )
    return Preference(chosen, rejected)


def _id(document: dict[str, Any], field: str) -> str:
    value = document.get(field)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is {repr(value)}; expected {OF[field]}.")
    return _storable(field, value)


def _index(document: dict[str, Any], field: str) -> int:
    value: Any = document[field]
    if isinstance(value, float) and value.is_integer():  # 1.0 is an integer in JSON
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(
            f"{field} is {repr(value)}; expected the `index` of a choice of the answer in `id`."
        )
    return int(value)


def _scores(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(
            f"scores is {repr(value)}; expected a list with a number for each choice of a request "
            "with n of 2 or more."
        )
    for score in value:
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not -LARGEST_SCORE <= score <= LARGEST_SCORE
        ):
            raise ValueError(
                f"scores holds {repr(score)}; expected finite numbers from {-LARGEST_SCORE:g} to "
                f"{LARGEST_SCORE:g}."
            )
    return tuple(map(float, value))


def _score(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"score is {repr(value)}; expected a number from 0 (wrong) to 1 (right).")
    return float(value)


def _thumb(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in THUMBS:
        raise ValueError(f'thumb is {repr(value)}; expected "up" or "down".')
    return THUMBS[value]


def _calls(value: Any) -> str | None:
    """The tool calls that would have been right, as JSON: OpenAI's, arguments as an object."""
    if value is None:
        return None
    expected = (
        'expected a list of {"function": {"name": "<name>", "arguments": {...}}}, with the '
        "arguments as an object or as JSON text of one"
    )
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_CALLS:
        raise ValueError(f"tool_calls is {repr(value)}; {expected}.")
    calls = []
    for place, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str):
            raise ValueError(f"tool_calls[{place}] is {repr(call)}; {expected}.")
        if re.fullmatch(FUNCTION, name) is None:
            raise ValueError(
                f"tool_calls[{place}].function.name is {repr(name)}; expected 1 to 128 letters, "
                "digits and . : / _ -"
            )
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(
                f"tool_calls[{place}].function.arguments is {repr(function['arguments'])}; "
                f"{expected}."
            )
        of_it = {"name": name, "arguments": arguments}
        calls.append({"id": f"call-{place}", "type": "function", "function": of_it})
    try:
        text = json.dumps(calls, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tool_calls holds what is no JSON ({error}); {expected}.") from None
    return _storable("tool_calls", text)


def _text(document: dict[str, Any], field: str) -> str | None:
    value = document.get(field)
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ValueError(f"{field} is {repr(value)}; expected a text that is not empty.")
    return _storable(field, value)


def _storable(field: str, text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{field} holds half a surrogate pair (\\ud800 to \\udfff); expected Unicode text."
        )
    return text
