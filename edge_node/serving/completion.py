"""The life of one request for an answer.

In: the body of a POST to a completions route. Out: 400 for a request that cannot be read or asks
too much, 404 for a model that is not a client's, 503 before the first release; otherwise vLLM's
answer, with the version fixed at arrival and the last event held back until the interaction is
durable.
Guarantees: body, header and captured record name the same version. A stream whose first event is
an error is answered with that error's status.
"""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

from edge_node.capture import SERVED, Finished, Served, is_kept
from edge_node.serving import limits
from edge_node.serving.aliases import PRIVATE
from edge_node.serving.asgi import App, Message, Receive, Send, answer, refuse, replay
from edge_node.serving.gateway import Gateway
from edge_node.serving.labels import Labels, read_labels
from edge_node.serving.refusals import (
    PROGRESS,
    UNREADABLE,
    Progress,
    Unreadable,
    explain,
    read_request,
)
from edge_node.serving.sessions import Session

LARGE_BODY_BYTES = 1 << 20
MODEL_HEADER = b"x-lorikeet-model"
KEY_OF_REQUEST = "lorikeet.key"
"""Where the scope of a request names its access key; access.py puts it there."""
END_OF_STREAM = b"data: [DONE]\n\n"
ERROR_EVENT = b'data: {"error":'


class Completion:
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
        self._gateway, self._app, self._scope, self._receive, self._send = (
            gateway,
            app,
            scope,
            receive,
            send,
        )
        self._request: dict[str, Any] = {}
        self._model: str | None = None
        self._pieces: list[bytes] = []
        self._capturing = False
        self._streamed = False
        self._served = Served()
        self._labels = Labels()
        self._gone = False
        """The client hung up: what vLLM says now, `null`, is no answer."""
        self._held: Message | None = None
        """The start of a stream, until its first event says whether it is an answer."""
        self._refused = False
        self._started = False
        """The start of a response has left: there cannot be another."""

    async def run(self, body: bytes) -> None:
        try:
            self._labels = read_labels(self._scope["headers"])
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
            await self._app(self._scope, replay(body, self._receive), self._send)
            return
        asked = request.get("model")
        if asked is None or isinstance(asked, str):
            self._model = self._gateway.aliases.resolve(asked)
            if self._model is None:
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
        capture, key = self._gateway.settings.capture, self._scope.get(KEY_OF_REQUEST)
        self._capturing = self._session is None and is_kept(capture, key, self._scope, request)
        body = json.dumps(request).encode()
        headers = [
            (name, value)
            for name, value in self._scope["headers"]
            if name not in (b"content-length", b"x-request-id")
        ]
        if (unkept := request.get("request_id")) is not None:
            headers.append((b"x-request-id", unkept.encode()))
        scope = {**self._scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        if self._model is None:
            await self._app(scope, replay(body, self._receive), self._send)
            return
        self._gateway.aliases.enter(self._model)
        if request.get("stream") is True and not self._of_the_node:
            self._gateway.first_tokens.begin(self)
        before = SERVED.set(self._recorded())
        progress = Progress()
        before_progress = PROGRESS.set(progress)
        try:
            await self._app(scope, replay(body, self._hear), self._send_on)
        except UNREADABLE as error:
            if progress.in_engine or self._started:
                raise
            await self._refuse(explain(self._scope["path"], request, error))
        finally:
            PROGRESS.reset(before_progress)
            SERVED.reset(before)
            self._gateway.first_tokens.left(self)
            self._gateway.in_flight.end(self)
            self._gateway.aliases.leave(self._model)
            if self._capturing and self._pieces:  # the client went away
                self._gateway.recorder.offer(self._finished(aborted=True))

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
            await answer(self._send, _status_of(error), {"error": error})
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
        if self._streamed and not self._pieces:
            self._gateway.in_flight.begin(self, piece, user_of(self._scope))
        self._pieces.append(piece)
        if piece.endswith(END_OF_STREAM) if self._streamed else not message.get("more_body", False):
            self._capturing = False
            await self._gateway.recorder.keep(self._finished())

    def _finished(self, *, aborted: bool = False) -> Finished:
        now = datetime.now(UTC).isoformat()
        return Finished(
            self._scope["path"],
            self._request,
            self._pieces,
            self._streamed,
            now,
            self._served,
            user_of(self._scope),
            **vars(self._labels),
            aborted=aborted,
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
