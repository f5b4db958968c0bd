"""The ASGI layer around vLLM's server and an operator's middleware.

In: every HTTP request that access.py lets in. Out: 404 for paths that clients do not need, 503
while draining or before the first release, 400 for a request that cannot be read or asks too much;
otherwise vLLM's answer, with the version fixed at arrival and the last event held back until the
interaction is durable.
Guarantees: body, header and captured record name the same version. A stream whose first event is
an error is answered with that error's status.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any

from edge_node.capture import SERVED, Finished, Served
from edge_node.serving import gateway as gateways
from edge_node.serving import limits
from edge_node.serving.aliases import PRIVATE
from edge_node.serving.gateway import Gateway
from edge_node.serving.refusals import (
    PROGRESS,
    UNREADABLE,
    Progress,
    Unreadable,
    explain,
    read_request,
)
from edge_node.serving.sessions import Session

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

COMPLETIONS = frozenset({"/v1/chat/completions", "/v1/completions"})
ALWAYS = frozenset({"/health", "/ready", "/metrics", "/version"})
ALLOWED = COMPLETIONS | ALWAYS | {"/v1/models", "/v1/feedback"}
WITH_BODY = COMPLETIONS | {"/v1/feedback"}
LARGE_BODY_BYTES = 1 << 20
RETRY_AFTER_S = 5
MODEL_HEADER = b"x-lorikeet-model"
CAPTURE_HEADER = b"x-lorikeet-capture"
KEY_OF_REQUEST = "lorikeet.key"
"""Where the scope of a request names its access key; access.py puts it there."""
END_OF_STREAM = b"data: [DONE]\n\n"
ERROR_EVENT = b'data: {"error":'


class LorikeetMiddleware:
    """Named to vLLM as `--middleware edge_node.serving.middleware.LorikeetMiddleware`."""

    def __init__(
        self,
        app: App,
        gateway: Gateway | None = None,
        *,
        of_the_node: bool = False,
        session: Session | None = None,
    ) -> None:
        """`of_the_node`: its requests are the node's own, which may name a policy.

        `session`: all its requests are of this one, which keeps their tokens instead of capture.
        """
        self._app = app
        self._gateway = gateway
        self._of_the_node = of_the_node
        self._session = session

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
            text = f"No route {path}. Routes here: {', '.join(sorted(ALLOWED))}."
            await refuse(send, 404, "NotFoundError", text)
        elif gateway is None:
            text = "The lorikeet plug-in of vLLM is not loaded."
            await refuse(send, 503, "ServiceUnavailableError", text)
        elif path not in ALWAYS and (reason := gateway.refusal()) is not None:
            await refuse(send, 503, "ServiceUnavailableError", reason)
        elif path in WITH_BODY and scope["method"] == "POST":
            most_mib = gateway.settings.serving.limits.body_mib
            most_bytes = math.inf if self._of_the_node else most_mib << 20
            body = await _read_body(receive, most_bytes)
            if body is None:
                return
            if len(body) > most_bytes:
                text = (
                    f"The body is larger than {most_mib} MiB, the most this node reads "
                    "(EDGE_SERVING__LIMITS__BODY_MIB)."
                )
                await refuse(send, 413, "BadRequestError", text)
            elif path in COMPLETIONS:
                completion = _Completion(
                    gateway, self._app, scope, receive, send,
                    of_the_node=self._of_the_node, session=self._session,
                )  # fmt: skip
                await completion.run(body)
            else:
                await self._app(scope, _replay(body, receive), send)
        else:
            await self._app(scope, receive, send)


class _Completion:
    """One POST to a completions route."""

    def __init__(
        self,
        gateway: Gateway,
        app: App,
        scope: Message,
        receive: Receive,
        send: Send,
        *,
        of_the_node: bool,
        session: Session | None,
    ) -> None:
        self._of_the_node = of_the_node
        self._session = session
        self._gateway, self._app, self._scope = gateway, app, scope
        self._receive, self._send = receive, send
        self._request: dict[str, Any] = {}
        self._model: str | None = None
        self._pieces: list[bytes] = []
        self._capturing = False
        self._streamed = False
        self._served = Served()
        self._gone = False
        """The client hung up: what vLLM says now, `null`, is no answer."""
        self._held: Message | None = None
        """The start of a stream, until its first event says whether it is an answer."""
        self._refused = False
        self._started = False
        """The start of a response has left: there cannot be another."""

    async def run(self, body: bytes) -> None:
        try:
            if len(body) < LARGE_BODY_BYTES:
                request = read_request(body)
            else:  # checked for seconds: other requests go on meanwhile
                request = await asyncio.to_thread(read_request, body)
            if request is not None and self._session is not None:
                request = self._session.bind(self._scope["path"], request)
            elif request is not None and not self._of_the_node:
                limits.bound(
                    self._scope["path"],
                    request,
                    self._gateway.settings.serving.limits,
                    self._gateway.engine.max_model_len,
                )
        except Unreadable as mistake:
            await self._refuse(mistake)
            return
        if request is None:
            # Not a request that could reach a model: vLLM's own 400 names the mistake.
            await self._app(self._scope, _replay(body, self._receive), self._send)
            return
        asked = request.get("model")
        if asked is None or isinstance(asked, str):
            key = self._scope.get(KEY_OF_REQUEST)
            self._model = self._gateway.versions.choose(asked, key, request.get("user"))
            if self._model is None or self._gateway.refusal() is not None:
                await refuse(
                    self._send,
                    503,
                    "ServiceUnavailableError",
                    self._gateway.not_ready() or "Not ready.",
                )
                return
            if self._model.startswith(PRIVATE) and not self._of_the_node:
                # As vLLM says it of a name that it does not know.
                text = f"The model `{self._model}` does not exist."
                await refuse(self._send, 404, "NotFoundError", text, param="model")
                return
            if self._gateway.aliases.retiring(self._model):
                text = (
                    f"The model `{self._model}` is being unloaded. "
                    f"Use `{self._gateway.aliases.alias}`."
                )
                await refuse(self._send, 404, "NotFoundError", text, param="model")
                return
            request["model"] = self._model
        # The id of an answer names its interaction, so it is the node's to give.
        request.pop("request_id", None)
        await self._pass_on(request)

    async def _pass_on(self, request: dict[str, Any]) -> None:
        self._request = request
        body = json.dumps(request).encode()
        headers = [
            (name, value)
            for name, value in self._scope["headers"]
            if name not in (b"content-length", b"x-request-id")
        ]
        scope = {**self._scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        self._capturing = (
            self._session is None
            and self._gateway.settings.capture.enabled
            and (CAPTURE_HEADER, b"off") not in headers
        )
        if self._model is None:
            await self._app(scope, _replay(body, self._receive), self._send)
            return
        self._answer = self._gateway.versions.enter(self._model)
        if request.get("stream") is True and not self._of_the_node:
            self._gateway.first_tokens.begin(self)
        before = SERVED.set(self._recorded())
        progress = Progress()
        before_progress = PROGRESS.set(progress)
        try:
            await self._app(scope, _replay(body, self._hear), self._send_on)
        except UNREADABLE as error:
            if progress.in_engine or self._started:
                raise
            self._answer.status = 400
            await self._refuse(explain(self._scope["path"], request, error))
        finally:
            PROGRESS.reset(before_progress)
            SERVED.reset(before)
            self._gateway.first_tokens.left(self)
            self._gateway.versions.leave(self._answer)

    def _recorded(self) -> Served | None:
        """Where the engine leaves the ids of this request."""
        if self._session is not None:
            return self._session.served
        return self._served if self._capturing else None

    async def _hear(self) -> Message:
        message = await self._receive()
        self._gone = self._gone or message["type"] == "http.disconnect"
        return message

    async def _send_on(self, message: Message) -> None:
        if self._refused:  # what follows the error in a stream
            return
        if message["type"] == "http.response.start":
            self._begin(message)
            if self._streamed:
                self._held = message
            else:
                await self._start(message)
            return
        elif message["type"] == "http.response.body":
            self._gateway.last_progress = time.monotonic()
            self._gateway.first_tokens.came(self)
            if self._held is not None and await self._refuses(message.get("body", b"")):
                return
            if self._capturing and not self._gone:
                await self._capture(message)
        await self._send(message)

    def _begin(self, start: Message) -> None:
        headers = start["headers"] = list(start.get("headers", ()))
        self._capturing = self._capturing and start["status"] == 200
        if start["status"] == 500 and self._gateway.engine.errored:  # another one is started
            start["status"] = 503
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        self._answer.status = start["status"]
        if start["status"] == 200:
            headers.append((MODEL_HEADER, (self._model or "").encode()))
        self._streamed = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )

    async def _refuses(self, event: bytes) -> bool:
        """Sends the start of a stream, or the answer of one that begins with an error."""
        start, self._held = self._held, None
        if (error := _error_of(event)) is not None:
            self._refused = self._started = True
            self._answer.status = 503 if self._gateway.engine.errored else _status_of(error)
            await _answer(self._send, self._answer.status, {"error": error})
        elif start is not None:
            await self._start(start)
        return self._refused

    async def _start(self, message: Message) -> None:
        self._started = True
        await self._send(message)

    async def _refuse(self, mistake: Unreadable) -> None:
        await refuse(self._send, 400, "BadRequestError", str(mistake), mistake.param)

    async def _capture(self, message: Message) -> None:
        """Keeps the piece; the last one waits here until the interaction is on disk."""
        piece = message.get("body", b"")
        self._pieces.append(piece)
        if piece.endswith(END_OF_STREAM) if self._streamed else not message.get("more_body", False):
            self._capturing = False
            now = datetime.now(UTC).isoformat()
            await self._gateway.recorder.keep(
                Finished(
                    self._scope["path"],
                    self._request,
                    self._pieces,
                    self._streamed,
                    now,
                    self._served,
                    user_of(self._scope),
                )
            )


def user_of(scope: Message) -> str | None:
    """The user of the access key that a request came with; None: no key, or one for all."""
    key = scope.get(KEY_OF_REQUEST)
    return key.user if key is not None else None


def _error_of(event: bytes) -> Any:
    """The error that a stream begins with; None for an answer."""
    if not event.startswith(ERROR_EVENT):
        return None
    try:
        return json.loads(event.removeprefix(b"data: ").partition(b"\n")[0])["error"]
    except ValueError:  # not a whole event
        return None


def _status_of(error: Any) -> int:
    """The HTTP status that the error names; 500 when it names none of an error."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500


async def _read_body(receive: Receive, most_bytes: float) -> bytes | None:
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


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


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
    await _answer(send, status, {"error": error}, headers)


async def _answer(
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
