"""The body of POST /v1/feedback.

In: bytes. Out: a Feedback. Guarantees: a ValueError names the field, the value seen and what was expected.
"""

from __future__ import annotations

import json
from reprlib import repr  # the value seen, cut short
from typing import Any

from edge_node.experience import Feedback

FIELDS = ("id", "score", "correction", "comment")
EXPECTED = 'Expected {"id": "<id of an answer>"} with at least one of "score" (0 to 1), "correction" and "comment".'


def read_feedback(body: bytes) -> Feedback:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The body is not JSON ({error}). {EXPECTED}") from None
    if not isinstance(document, dict):
        raise ValueError(f"The body is a JSON {type(document).__name__}. {EXPECTED}")
    if unknown := sorted(set(document) - set(FIELDS)):
        raise ValueError(f"Unknown field {repr(unknown[0])}; expected {', '.join(FIELDS)}.")
    interaction_id = document.get("id")
    if not isinstance(interaction_id, str) or not interaction_id:
        raise ValueError(f"id is {repr(interaction_id)}; expected the `id` of an answer.")
    feedback = Feedback(
        _storable("id", interaction_id),
        _score(document.get("score")),
        _text(document, "correction"),
        _text(document, "comment"),
    )
    if feedback.score is None and feedback.correction is None and feedback.comment is None:
        raise ValueError(f"The feedback says nothing. {EXPECTED}")
    return feedback


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
        raise ValueError(f"{field} holds half a surrogate pair (\\ud800 to \\udfff); expected Unicode text.")
    return text
