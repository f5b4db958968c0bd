"""The OpenAPI description of the node's own routes: feedback, health, readiness, models.

In: nothing. Out: one JSON document, served at /v1/openapi.json and written to docs/reference. A
test asks the routes what it says (schemathesis). What vLLM offers is described by OpenAI.
"""

from __future__ import annotations

from typing import Any

from edge_node import __version__
from edge_node.serving.feedback import FUNCTION, LARGEST_SCORE, MOST_CALLS, THUMBS

Schema = dict[str, Any]

ID: Schema = {"type": "string", "minLength": 1, "description": "The `id` of an answer."}
TEXT: Schema = {"type": "string", "minLength": 1}
NUMBER: Schema = {"type": "number", "minimum": 0, "maximum": 1}
INDEX: Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
THUMB: Schema = {"type": "string", "enum": list(THUMBS)}
SCORE = NUMBER | {"description": "0 is wrong, 1 is right; below 0.5 is a dislike."}
COMMENT = TEXT | {"description": "Kept; nothing is learnt from it."}
CALLS: Schema = {
    "type": "array", "minItems": 1, "maxItems": MOST_CALLS,
    "description": "The tool calls that would have been right, in order.",
    "items": {
        "type": "object", "required": ["function"],
        "properties": {
            "function": {
                "type": "object", "required": ["name"],
                "properties": {
                    "name": {"type": "string", "pattern": FUNCTION},
                    "arguments": {"type": "object"},
                },
            }
        },
    },
}  # fmt: skip
ONE_OF_SCORES: Schema = {
    "type": "number", "minimum": -LARGEST_SCORE, "maximum": LARGEST_SCORE,
}  # fmt: skip
REASON: Schema = {"type": "string", "description": "Why nothing can be learnt from it."}
USABLE: Schema = {
    "type": ["boolean", "null"],
    "description": "Whether the node can learn from it; null while it waits for its answer.",
}
WAITING: Schema = {"const": True, "description": "Its answer is under way."}
TIME: Schema = {"type": "string", "format": "date-time"}
PART = {"required": ["id", "choice"], "type": "object", "properties": {"id": ID, "choice": INDEX}}
BODIES: dict[str, Schema] = {
    "Verdict": {
        "description": "What was right or wrong of one answer.",
        "properties": {
            "id": ID, "thumb": THUMB, "score": SCORE, "comment": COMMENT,
            "correction": TEXT | {
                "description": "What should have followed the prompt, in the model's own format."
            },
            "tool_calls": CALLS,
        },
        "required": ["id"],
        "anyOf": [
            {"required": [name]} for name in ("thumb", "score", "correction", "tool_calls",
                                              "comment")
        ],
        "allOf": [
            {"not": {"required": ["thumb", "score"]}},
            {"not": {"required": ["correction", "tool_calls"]}},
        ],
    },
    "EpisodeVerdict": {
        "description": "What was right or wrong of all answers that an episode has now.",
        "properties": {
            "episode": TEXT | {"description": "The header `x-lorikeet-episode` of the requests."},
            "thumb": THUMB, "score": SCORE, "comment": COMMENT,
        },
        "required": ["episode"],
        "anyOf": [{"required": [name]} for name in ("thumb", "score", "comment")],
        "not": {"required": ["thumb", "score"]},
    },
    "Preference": {
        "description": "Which of two answers to the same messages is better.",
        "properties": {"chosen": ID, "rejected": ID},
        "required": ["chosen", "rejected"],
    },
    "ChoicePreference": {
        "description": "Which of two choices of a request with `n` > 1 is better.",
        "properties": {"id": ID, "chosen": INDEX, "rejected": INDEX},
        "required": ["id", "chosen", "rejected"],
    },
    "Scores": {
        "description": "A score for each choice of a request with `n` > 1, in the order of "
        "`index`.",
        "properties": {
            "id": ID, "scores": {"type": "array", "minItems": 2, "items": ONE_OF_SCORES},
        },
        "required": ["id", "scores"],
    },
}  # fmt: skip
SCHEMAS: dict[str, Schema] = {
    **{name: {"type": "object", "additionalProperties": False, **body}
       for name, body in BODIES.items()},
    "Feedback": {"oneOf": [{"$ref": f"#/components/schemas/{name}"} for name in BODIES]},
    "Receipt": {
        "type": "object", "required": ["id", "usable"],
        "properties": {
            "id": {"type": ["string", "null"],
                   "description": "null: the answer was not kept, so nothing is."},
            "interaction": ID, "episode": TEXT,
            "answers": {"type": "integer", "minimum": 1}, "usable": USABLE, "reason": REASON,
            "waiting": WAITING,
        },
    },
    "Told": {
        "type": "object", "required": ["id", "created_at", "kind", "usable"],
        "properties": {
            "id": {"type": "string"}, "created_at": TIME,
            "kind": {"enum": ["thumb", "score", "comment", "correction", "tool_calls",
                              "preference", "group"]},
            "interaction": ID, "episode": TEXT, "answers": {"type": "integer", "minimum": 1},
            "thumb": THUMB, "score": NUMBER, "comment": TEXT, "correction": TEXT,
            "tool_calls": CALLS, "chosen": PART, "rejected": PART,
            "scores": {"type": "array", "items": ONE_OF_SCORES},
            "usable": USABLE, "reason": REASON, "waiting": WAITING,
        },
    },
    "Deleted": {
        "type": "object", "required": ["id", "deleted", "deleted_at"],
        "properties": {"id": {"type": "string"}, "deleted": {"const": True}, "deleted_at": TIME},
    },
    "Ready": {
        "type": "object", "required": ["ready"],
        "properties": {
            "ready": {"type": "boolean"}, "model": {"type": ["string", "null"]},
            "reason": {"type": "string"},
        },
    },
    "Models": {
        "type": "object", "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object", "required": ["id", "object", "root"],
                    "properties": {
                        "id": {"type": "string"}, "object": {"const": "model"},
                        "root": {"type": "string", "description": "The exact version behind it."},
                        "parent": {"type": ["string", "null"]},
                        "max_model_len": {"type": "integer"},
                    },
                },
            },
        },
    },
    "Error": {
        "type": "object", "required": ["error"],
        "properties": {
            "error": {
                "type": "object", "required": ["message", "type", "code"],
                "properties": {
                    "message": {"type": "string"}, "type": {"type": "string"},
                    "param": {"type": ["string", "null"]}, "code": {"type": "integer"},
                },
            }
        },
    },
}  # fmt: skip
ERRORS = {
    400: "It cannot be used; the message says which field, the value and what was expected.",
    401: "No access key, or one that is not valid.",
    403: "The access key lacks the scope of this route.",
    404: "No such answer, episode or feedback; or another user's.",
    405: "The route has no such method.",
    410: "It was deleted.",
    413: "The body is too large.",
    422: "The idempotency key came with another body before.",
    429: "The access key has used its quota; `Retry-After` says when to try again.",
    503: "The node is not ready, drains, or cannot write; `Retry-After` says when to try again.",
}
OF_A_KEY = (401, 403, 429, 503)


def openapi() -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    of_one = {
        "name": "feedback_id", "in": "path", "required": True,
        "description": "The `id` in an answer of POST /v1/feedback.", "schema": TEXT,
    }  # fmt: skip
    once = {
        "name": "Idempotency-Key", "in": "header", "required": False,
        "description": "The same body with the same key again is answered the same, and written "
        "once. A key is remembered for 7 days, for each access key.",
        "schema": {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"},
    }  # fmt: skip
    posted = _operation(
        "giveFeedback", "Say what was right or wrong of an answer.",
        {200: ("Receipt", "It is on disk."),
         202: ("Receipt", "It is on disk, and counts when its answer is finished.")},
        (400, 404, 413, 422, *OF_A_KEY),
    )  # fmt: skip
    posted |= {
        "parameters": [once],
        "requestBody": {"required": True, "content": _json("Feedback")},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Lorikeet edge node",
            "version": __version__,
            "description": "The routes of a node that are its own. What answers requests "
            "(`/v1/chat/completions` and its like) is OpenAI's.",
        },
        "security": [{"key": []}],
        "paths": {
            "/health": {
                "get": _operation(
                    "health", "Whether vLLM lives.", {200: (None, "It does.")}, (503,)
                )
                | {"security": []}
            },
            "/ready": {
                "get": _operation(
                    "ready", "Whether this node should get traffic.",
                    {200: ("Ready", "It should.")}, (),
                )
                | {"security": []}
            },
            "/v1/models": {
                "get": _operation(
                    "models", "The alias and each version.", {200: ("Models", "Both.")}, OF_A_KEY
                )
            },
            "/v1/feedback": {"post": posted},
            "/v1/feedback/{feedback_id}": {
                "parameters": [of_one],
                "get": _operation(
                    "readFeedback", "Read back what was said.", {200: ("Told", "As it was said.")},
                    (404, 410, *OF_A_KEY),
                ),
                "delete": _operation(
                    "deleteFeedback", "Take feedback back: no later round learns from it.",
                    {200: ("Deleted", "It is gone, now or before.")}, (404, *OF_A_KEY),
                ),
            },
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _operation(
    name: str,
    summary: str,
    answers: dict[int, tuple[str | None, str]],
    errors: tuple[int, ...],
) -> dict[str, Any]:
    responses: dict[str, Any] = {
        str(status): {"description": text} | ({"content": _json(schema)} if schema else {})
        for status, (schema, text) in answers.items()
    }
    for status in sorted(errors):
        responses[str(status)] = {"description": ERRORS[status], "content": _json("Error")}
    if name == "ready":
        responses["503"] = {"description": "It should not.", "content": _json("Ready")}
    return {"operationId": name, "summary": summary, "responses": responses}


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
