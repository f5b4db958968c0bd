"""ASGI as our layers around vLLM's server speak it.

In: one request's `receive` and `send`. Out: its body, read within a bound; an error in the form of
OpenAI's API. Guarantees: a 503 says when to come back.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

RETRY_AFTER_S = 5
REQUEST_ID = b"x-request-id"
USABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")


def request_id_of(scope: Message) -> bytes:
    """The client's id of a request, or a new one."""
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID), b"")
    return given if USABLE_ID.fullmatch(given) else uuid.uuid4().hex.encode()


async def read_body(receive: Receive, most_bytes: float) -> bytes | None:
    """The body, or its beginning when it is too large; None when the client went away."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most_bytes or not message.get("more_body", False):
            return b"".join(pieces)


def replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(
    send: Send,
    status: int,
    kind: str,
    message: str,
    param: str | None = None,
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Answers with an error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    await answer(send, status, {"error": error}, headers)


async def answer(
    send: Send,
    status: int,
    document: dict[str, Any],
    more_headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        # Closed, so that no next request comes on it while a server that stops closes it.
        headers += [(b"retry-after", str(RETRY_AFTER_S).encode()), (b"connection", b"close")]
    headers += more_headers
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
