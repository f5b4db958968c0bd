"""The outermost ASGI layer of vLLM's server: who asks, and may they?

In: every HTTP request at the port. Out: 401 without a valid key where one is required, 403 without
the route's scope, 429 for a key that asks too much; otherwise the answer of the layers inside, with
`x-request-id`. Guarantees: no route but OPEN answers without a key; a key is never logged or
echoed. The node's own requests take the control socket and do not come here.
"""

from __future__ import annotations

import math

from edge_node.access import Key, Scope
from edge_node.serving import gateway as gateways
from edge_node.serving.anthropic_errors import in_anthropics_form
from edge_node.serving.asgi import (
    REQUEST_ID,
    App,
    Message,
    Receive,
    Send,
    refuse,
    request_id_of,
)
from edge_node.serving.completion import KEY_OF_REQUEST, MODEL_HEADER
from edge_node.serving.counts import ServingCounts
from edge_node.serving.gateway import Gateway
from edge_node.serving.routes import ALLOWED, ANTHROPIC, OPEN, SCOPES, route_of
from lorikeet import traces

ANTHROPICS_ID = b"request-id"
"""What Anthropic's clients read the same id from."""
CHALLENGE = b'Bearer realm="lorikeet"'


class AccessMiddleware:
    """Named to vLLM as the last `--middleware`, which is the first to see a request."""

    def __init__(self, app: App, gateway: Gateway | None = None) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        gateway = self._gateway or gateways.here
        if scope["type"] != "http" or gateway is None:
            await self._app(scope, receive, send)  # where WebSockets are closed, and all else 503
            return
        scope, send = _with_request_id(scope, send, gateway.counts)
        if scope["path"] in ANTHROPIC:
            send = in_anthropics_form(send)
        if scope["path"] in OPEN or _is_preflight(scope):
            await self._app(scope, receive, send)
            return
        sent = _sent_key(scope)
        key = gateway.keys.find(sent) if sent else None
        if gateway.keys.required and not await _is_let_in(scope, send, sent, key):
            return
        name = key.name if key else ""
        if (wait := gateway.quotas.enter(name)) is not None:
            after = str(math.ceil(wait.retry_after_s)).encode()
            await refuse(send, 429, "RateLimitError", wait.text, headers=[(b"retry-after", after)])
            return
        try:
            with traces.request(_header(scope, b"traceparent")):
                await self._app({**scope, KEY_OF_REQUEST: key}, receive, send)
        finally:
            gateway.quotas.leave(name)


async def _is_let_in(scope: Message, send: Send, sent: bytes | None, key: Key | None) -> bool:
    """May this request go on? Where not, it is answered."""
    if key is None:
        what = (
            "The access key of this request is not valid: it is unknown here, or it was revoked."
            if sent
            else "This node needs an access key, and the request has none."
        )
        text = (
            f"{what} Expected `Authorization: Bearer lk-...`, or the key in `x-api-key`. The "
            "operator of the node makes one with `edge-node keys create`."
        )
        challenge = CHALLENGE + (b', error="invalid_token"' if sent else b"")
        headers = [(b"www-authenticate", challenge)]
        await refuse(send, 401, "AuthenticationError", text, headers=headers)
        return False
    if (needed := _needed(scope["path"])) is None or needed in key.scopes:
        return True
    text = (
        f"The access key {key.name!r} has the scopes {', '.join(key.scopes)}; {scope['path']} "
        f"needs {needed.value}. The operator of the node makes such a key with `edge-node keys "
        f"create NAME --scope {needed.value}`."
    )
    await refuse(send, 403, "PermissionDeniedError", text)
    return False


def _needed(path: str) -> Scope | None:
    """The scope of a route; None for a path that is none, which is 404 inside."""
    route = route_of(path)
    return SCOPES.get(route, Scope.ADMIN) if route in ALLOWED else None


def _sent_key(scope: Message) -> bytes | None:
    """The key as OpenAI's clients send it, or as Anthropic's do."""
    other = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            if scheme.lower() == b"bearer" and credentials.strip():
                return bytes(credentials.strip())
        elif name == b"x-api-key":
            other = bytes(value.strip())
    return other


def _header(scope: Message, wanted: bytes) -> bytes | None:
    return next((value for name, value in scope["headers"] if name == wanted), None)


def _is_preflight(scope: Message) -> bool:
    """A browser asks what it may send, without a key. vLLM's CORS layer answers; no route does."""
    names = {name for name, _ in scope["headers"]}
    return scope["method"] == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names


def _with_request_id(scope: Message, send: Send, counts: ServingCounts) -> tuple[Message, Send]:
    """The client's id, or a new one, in the request and in its answer, which is counted."""
    request_id = request_id_of(scope)
    headers = [header for header in scope["headers"] if header[0] != REQUEST_ID]
    ids = [(REQUEST_ID, request_id)]
    if scope["path"] in ANTHROPIC:
        ids.append((ANTHROPICS_ID, request_id))

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            others = [h for h in message.get("headers", ()) if h[0].lower() != REQUEST_ID]
            message = {**message, "headers": [*others, *ids]}
            model = next((value for name, value in others if name == MODEL_HEADER), None)
            asked = route_of(scope["path"])
            route = asked if asked in ALLOWED else None
            counts.answered(route, message["status"], model)
            version = None if model is None else model.decode()
            traces.say(route=route, status=message["status"], version=version)
        await send(message)

    return {**scope, "headers": [*headers, (REQUEST_ID, request_id)]}, send_on
