"""The life of one request to a model.

In: the body of a POST to a route of `routes.OF_A_MODEL`. Out: 400 for a request that cannot be read
or asks too much, 404 for a model that is not a client's, 503 before the first release; otherwise
vLLM's answer, with the version fixed at arrival and the last event held back until the interaction
is durable, where the model wrote one.
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
from edge_node.serving import events, limits, responses
from edge_node.serving.asgi import App, Message, Receive, Send, answer, refuse, replay
from edge_node.serving.fingerprint import WEIGHTS, WEIGHTS_HEADER
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
from edge_node.serving.routes import ANSWERS, ANTHROPIC, RESPONSES
from edge_node.serving.sessions import Session
from edge_node.serving.versions import Answer, said_by

LARGE_BODY_BYTES = 1 << 20
MODEL_HEADER = b"x-lorikeet-model"
LEFT = 499
"""Stands for the status of an answer whose client went away before it began."""
KEY_OF_REQUEST = "lorikeet.key"
"""Where the scope of a request names its access key; access.py puts it there."""


class Completion:
    """One POST to a route of a model."""

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
        self._answer: Answer | None = None
        self._pieces: list[bytes] = []
        self._capturing = False
        self._streamed = False
        self._served = Served()
        self._labels = Labels()
        self._gone = False
        """The client hung up: what vLLM says now, `null`, is no answer."""
        self._progress = Progress()
        self._held: list[Message] = []
        """The beginning of a stream, until an event says whether it is an answer."""
        self._refused = False
        self._answered = False
        """vLLM answers with 200: where the engine has the request, each piece is its work."""
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
                self._bound(request)
        except Unreadable as mistake:
            await self._refuse(mistake)
            return
        if request is None:
            # Not a request that could reach a model: vLLM's own 400 names the mistake.
            await self._app(self._scope, replay(body, self._receive), self._send)
            return
        asked = request.get("model")
        if asked is None or isinstance(asked, str):
            self._model = self._chosen(asked, request)
            # Again: while the body came, the node may have begun to stop, or the engine ended.
            if self._model is None or self._gateway.refusal() is not None:
                await refuse(
                    self._send,
                    503,
                    "ServiceUnavailableError",
                    self._gateway.not_ready() or "Not ready.",
                )
                return
            if self._gateway.aliases.hidden(self._model) and not self._of_the_node:
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

    def _chosen(self, asked: str | None, request: dict[str, Any]) -> str | None:
        """The exact version; None: the alias points nowhere yet.

        The node's own requests are never drawn to a canary, nor to its own adapter.
        """
        if self._of_the_node:
            return self._gateway.aliases.resolve(asked)
        return self._gateway.versions.choose(
            asked, self._scope.get(KEY_OF_REQUEST), said_by(request)
        )

    def _bound(self, request: dict[str, Any]) -> None:
        """Raises Unreadable for a request that asks more than a client may."""
        path, most = self._scope["path"], self._gateway.settings.serving.limits
        engine = self._gateway.engine
        if path == RESPONSES:
            responses.without_state(request)
        limits.bound(path, request, most, engine.max_model_len, engine.longest_text)
        self._progress.most_prompt_tokens = limits.longest_prompt(request, most)

    async def _pass_on(self, request: dict[str, Any]) -> None:
        self._request = request
        capture, key = self._gateway.settings.capture, self._scope.get(KEY_OF_REQUEST)
        self._capturing = (
            self._session is None
            and self._scope["path"] in ANSWERS
            and is_kept(capture, key, self._scope, request)
        )
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
        entered = self._gateway.versions.enter(self._model, counted=not self._of_the_node)
        self._answer = entered
        if request.get("stream") is True and not self._of_the_node:
            self._gateway.first_tokens.begin(self)
        before = SERVED.set(self._recorded())
        weights = WEIGHTS.set(self._gateway.weights.get(self._model, ""))
        before_progress = PROGRESS.set(self._progress)
        try:
            await self._app(scope, replay(body, self._hear), self._send_on)
        except Exception as error:
            await self._failed(error)
        finally:
            PROGRESS.reset(before_progress)
            SERVED.reset(before)
            WEIGHTS.reset(weights)
            self._gateway.first_tokens.left(self)
            self._gateway.in_flight.end(self)
            if self._gone and not self._started:  # nobody heard an error
                self._counts_as(LEFT)
            self._gateway.versions.leave(entered)
            if self._capturing and self._pieces:  # the client went away
                self._gateway.recorder.offer(self._finished(aborted=True))

    async def _failed(self, error: Exception) -> None:
        """Answers 400 where the client has to change something; raises `error` otherwise."""
        if self._started:
            if not self._refused:
                self._counts_as(500)
            raise error
        if self._gateway.engine.errored:
            await self._refuse_for_now()
        elif self._progress.refused is not None:
            # A stream of /v1/responses breaks, where others send the error.
            await self._refuse(Unreadable(self._progress.refused))
        elif not self._progress.in_engine and (self._held or isinstance(error, UNREADABLE)):
            await self._refuse(explain(self._scope["path"], self._request, error))
        else:
            raise error

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
            await self._begin(message)
            return
        elif message["type"] == "http.response.body":
            if self._held and await self._holds(message):
                return
            if self._streamed and events.error_of(message.get("body", b"")) is not None:
                self._counts_as(500)  # it broke after its first piece
            if self._answered and self._progress.in_engine:
                self._gateway.last_progress = time.monotonic()
            self._gateway.first_tokens.came(self)
            if self._capturing and not self._gone:
                await self._capture(message)
        await self._send(message)

    async def _begin(self, start: Message) -> None:
        headers = start["headers"] = list(start.get("headers", ()))
        self._answered = start["status"] == 200
        self._capturing = self._capturing and self._answered
        self._counts_as(start["status"])
        if start["status"] >= 500 and self._gateway.engine.errored:
            await self._refuse_for_now()
            return
        if self._answered:
            headers.append((MODEL_HEADER, (self._model or "").encode()))
            headers.append((WEIGHTS_HEADER, WEIGHTS.get().encode()))
        elif start["status"] == 500 and self._catches() and not self._progress.in_engine:
            error = ValueError("it failed before the engine had it")
            await self._refuse(explain(self._scope["path"], self._request, error))
            return
        self._streamed = any(
            name.lower() == b"content-type" and value.startswith(b"text/event-stream")
            for name, value in headers
        )
        if self._streamed:
            self._held = [start]
        else:
            await self._start(start)

    def _catches(self) -> bool:
        """vLLM answers 500 on this route for what it raises on others."""
        return self._scope["path"] in ANTHROPIC

    async def _holds(self, message: Message) -> bool:
        """Holds the beginning of a stream, or sends it; True: `message` is not to be sent now.

        A stream that begins with an error gets the error's status instead.
        """
        event = message.get("body", b"")
        if events.is_preamble(event) and message.get("more_body", False):
            self._held.append(message)
            return True
        held, self._held = self._held, []
        if (error := events.error_of(event)) is not None:
            await self._refuse_stream(error)
            return True
        for one in held:
            if one["type"] == "http.response.body" and self._capturing and not self._gone:
                await self._capture(one)
            await self._start(one)
        return False

    async def _refuse_stream(self, error: Any) -> None:
        """Answers a stream that began with `error`."""
        status = events.status_of(error)
        if status >= 500 and self._gateway.engine.errored:
            await self._refuse_for_now()
        elif status == 500 and self._progress.refused is not None:
            await self._refuse(Unreadable(self._progress.refused))
        else:
            self._refused = self._started = True
            self._counts_as(status)
            await answer(self._send, status, {"error": error})

    def _counts_as(self, status: int) -> None:
        if self._answer is not None:
            self._answer.status = status

    async def _start(self, message: Message) -> None:
        self._started = True
        await self._send(message)

    async def _refuse(self, mistake: Unreadable) -> None:
        """Answers 400, and with nothing else of what vLLM says of this request."""
        self._refused = self._started = True
        self._counts_as(400)
        await refuse(self._send, 400, "BadRequestError", str(mistake), mistake.param)

    async def _refuse_for_now(self) -> None:
        """The engine has ended, and another one is started: the request may be sent again."""
        self._refused = self._started = True
        self._counts_as(503)
        text = self._gateway.refusal() or "Send the request again later."
        await refuse(self._send, 503, "ServiceUnavailableError", text)

    async def _capture(self, message: Message) -> None:
        """Keeps the piece; the last one waits here until the interaction is on disk."""
        piece = message.get("body", b"")
        if self._streamed and not self._pieces:
            self._gateway.in_flight.begin(self, piece, user_of(self._scope))
        self._pieces.append(piece)
        more = message.get("more_body", False)
        if events.is_last(self._scope["path"], piece) if self._streamed else not more:
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
