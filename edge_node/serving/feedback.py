"""The body of POST /v1/feedback.

In: bytes. Out: a Feedback, a Preference or Scores. Guarantees: a ValueError names field, value seen
and what was expected.
"""

from __future__ import annotations

import json
from reprlib import repr  # the value seen, cut short
from typing import Any

from edge_node.experience import Answer, Feedback, Preference, Scores

FIELDS = ("id", "score", "correction", "comment")
COMPARING = ("id", "chosen", "rejected", "scores")
"""Fields of a preference or of scores; they do not go with those of a verdict."""
EXPECTED = (
    'Expected {"id": "<id of an answer>"} with at least one of '
    '"score" (0 to 1), "correction" and "comment"; or {"chosen": "<id>", "rejected": "<id>"}; or '
    'with an id and two of its choices {"id": "<id>", "chosen": 0, "rejected": 1}; or with a score '
    'for each choice {"id": "<id>", "scores": [0.2, 1]}.'
)
LARGEST_SCORE = 1e6
"""Scores of a group are finite and no further from 0: their spread must be finite in float32."""


def read_feedback(body: bytes) -> Feedback | Preference | Scores:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is not JSON ({error}). {EXPECTED}") from None
    if not isinstance(document, dict):
        raise ValueError(f"The body is a JSON {type(document).__name__}. {EXPECTED}")
    compares = [name for name in COMPARING if name != "id" and document.get(name) is not None]
    fields = COMPARING if compares else FIELDS
    if unknown := sorted(set(document) - set(fields)):
        raise ValueError(f"Unknown field {repr(unknown[0])}; expected {', '.join(fields)}.")
    if compares == ["scores"]:
        return Scores(_id(document, "id"), _scores(document["scores"]))
    if compares:
        return _preference(document, compares)
    feedback = Feedback(
        _id(document, "id"),
        _score(document.get("score")),
        _text(document, "correction"),
        _text(document, "comment"),
    )
    if feedback.score is None and feedback.correction is None and feedback.comment is None:
        raise ValueError(f"The feedback says nothing. {EXPECTED}")
    return feedback


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
        raise ValueError(f"{field} is {repr(value)}; expected the `id` of an answer.")
    return _storable(field, value)


def _index(document: dict[str, Any], field: str) -> int:
    value: Any = document[field]
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
