"""The outermost ASGI layer of vLLM's server.

In: every HTTP request. Out: 404 for paths that clients do not need, 503 while draining or before the first release;
otherwise vLLM's answer, with the version fixed at arrival and the last event held back until the interaction is durable. Guarantees: body, header and captured record name the same version.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any

from edge_node.capture import SERVED, Finished, Served
from edge_node.serving import gateway as gateways
from edge_node.serving.gateway import Gateway

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ALWAYS = frozenset({"/health", "/ready", "/metrics", "/version"})
ALLOWED = COMPLETIONS | ALWAYS | {"/v1/models", "/v1/feedback"}
WITH_BODY = COMPLETIONS | {"/v1/feedback"}
MAX_BODY_BYTES = 64 << 20
RETRY_AFTER_S = 5
MODEL_HEADER = b"x-lorikeet-model"
CAPTURE_HEADER = b"x-lorikeet-capture"
END_OF_STREAM = b"data: [DONE]\n\n"


class LorikeetMiddleware:
    """Named to vLLM as `--middleware edge_node.serving.middleware.LorikeetMiddleware`."""

    def __init__(self, app: App, gateway: Gateway | None = None) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        gateway = self._gateway or gateways.here
        if path not in ALLOWED:
            await _refuse(send, 404, "NotFoundError", f"No route {path}. Routes here: {', '.join(sorted(ALLOWED))}.")
        elif gateway is None:
            await _refuse(send, 503, "ServiceUnavailableError", "The lorikeet plug-in of vLLM is not loaded.")
        elif gateway.draining and path not in ALWAYS:
            await _refuse(
                send, 503, "ServiceUnavailableError", "The node is draining; send the request to another node."
            )
        elif path in WITH_BODY and scope["method"] == "POST":
            body = await _read_body(receive)
            if body is None:
                return
            if len(body) > MAX_BODY_BYTES:
                text = f"The body is larger than {MAX_BODY_BYTES >> 20} MiB, which is the most this node reads."
                await _refuse(send, 413, "BadRequestError", text)
            elif path in COMPLETIONS:
                await _Completion(gateway, self._app, scope, receive, send).run(body)
            else:
                await self._app(scope, _replay(body, receive), send)
        else:
            await self._app(scope, receive, send)


class _Completion:
    """One POST to a completions route."""

    def __init__(self, gateway: Gateway, app: App, scope: Message, receive: Receive, send: Send) -> None:
        self._gateway, self._app, self._scope, self._receive, self._send = gateway, app, scope, receive, send
        self._request: dict[str, Any] = {}
        self._model: str | None = None
        self._pieces: list[bytes] = []
        self._capturing = False
        self._streamed = False
        self._served = Served()
        self._gone = False
        """The client hung up: what vLLM says now, `null`, is no answer."""

    async def run(self, body: bytes) -> None:
        try:
            request = json.loads(body)
        except RecursionError:
            # vLLM would fail on it with a 500 and a traceback in its log.
            await _refuse(self._send, 400, "BadRequestError", "The body's JSON is nested too deeply to be read.")
            return
        except ValueError:
            request = None
        if not isinstance(request, dict):
            # Not a request that could reach a model: vLLM's own 400 names the mistake.
            await self._app(self._scope, _replay(body, self._receive), self._send)
            return
        asked = request.get("model")
        if asked is None or isinstance(asked, str):
            self._model = self._gateway.aliases.resolve(asked)
            if self._model is None:
                await _refuse(self._send, 503, "ServiceUnavailableError", self._gateway.not_ready() or "Not ready.")
                return
            if self._gateway.aliases.retiring(self._model):
                text = f"The model `{self._model}` is being unloaded. Use `{self._gateway.aliases.alias}`."
                await _refuse(self._send, 404, "NotFoundError", text, param="model")
                return
            request["model"] = self._model
        # The id of an answer names its interaction, so it is the node's to give.
        request.pop("request_id", None)
        await self._answer(request)

    async def _answer(self, request: dict[str, Any]) -> None:
        self._request = request
        body = json.dumps(request).encode()
        headers = [
            (name, value) for name, value in self._scope["headers"] if name not in (b"content-length", b"x-request-id")
        ]
        scope = {**self._scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        self._capturing = self._gateway.settings.capture.enabled and (CAPTURE_HEADER, b"off") not in headers
        if self._model is None:
            await self._app(scope, _replay(body, self._receive), self._send)
            return
        self._gateway.aliases.enter(self._model)
        before = SERVED.set(self._served if self._capturing else None)
        try:
            await self._app(scope, _replay(body, self._hear), self._send_on)
        finally:
            SERVED.reset(before)
            self._gateway.aliases.leave(self._model)

    async def _hear(self) -> Message:
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        return message

    async def _send_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"] = list(message.get("headers", ()))
            self._capturing = self._capturing and message["status"] == 200
            if message["status"] == 200:
                headers.append((MODEL_HEADER, (self._model or "").encode()))
            self._streamed = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers
            )
        elif message["type"] == "http.response.body":
            self._gateway.last_progress = time.monotonic()
            if self._capturing and not self._gone:
                await self._capture(message)
        await self._send(message)

    async def _capture(self, message: Message) -> None:
        """Keeps the piece; the last one waits here until the interaction is on disk."""
        piece = message.get("body", b"")
        self._pieces.append(piece)
        if piece.endswith(END_OF_STREAM) if self._streamed else not message.get("more_body", False):
            self._capturing = False
            now = datetime.now(UTC).isoformat()
            await self._gateway.recorder.keep(
                Finished(self._scope["path"], self._request, self._pieces, self._streamed, now, self._served)
            )


async def _read_body(receive: Receive) -> bytes | None:
    """The body, or its beginning when it is too large; None when the client went away."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > MAX_BODY_BYTES or not message.get("more_body", False):
            return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, status: int, kind: str, message: str, param: str | None = None) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
