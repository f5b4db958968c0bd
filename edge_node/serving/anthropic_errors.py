"""Errors in the form of Anthropic's API, whichever layer made them.

In: what a request's answer is sent with. Out: the same, where an error has the form
{"type": "error", "error": {"type", "message"}}. Guarantees: status and message stay.
"""

from __future__ import annotations

import json
from typing import Any

from edge_node.serving.asgi import Message, Send

KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
OTHER = "api_error"
REPLACED = (b"content-length", b"content-type")


def in_anthropics_form(send: Send) -> Send:
    """`send`, which holds an error back until it is whole."""
    held: Message | None = None
    pieces: list[bytes] = []

    async def send_on(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start" and message["status"] >= 400:
            held = message
            return
        if held is None:
            await send(message)
            return
        pieces.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body = json.dumps(translated(held["status"], b"".join(pieces))).encode()
        headers = [h for h in held.get("headers", ()) if h[0].lower() not in REPLACED]
        headers += [(b"content-type", b"application/json")]
        headers += [(b"content-length", str(len(body)).encode())]
        await send({**held, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return send_on


def translated(status: int, body: bytes) -> dict[str, Any]:
    """The error of `body`, which is OpenAI's form, Anthropic's or none."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    error = document.get("error") if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    said = message if isinstance(message, str) else f"The request failed with HTTP {status}."
    return {"type": "error", "error": {"type": KINDS.get(status, OTHER), "message": said}}
