"""The ASGI layer around vLLM's server and an operator's middleware.

In: every HTTP request that access.py lets in. Out: 404 for paths that clients do not need, 503
while draining, 413 for too large a body; otherwise the answer of vLLM's route, where completion.py
has the life of a request to a model.
"""

from __future__ import annotations

import math

from edge_node.serving import gateway as gateways
from edge_node.serving.asgi import App, Message, Receive, Send, read_body, refuse, replay
from edge_node.serving.completion import Completion
from edge_node.serving.gateway import Gateway
from edge_node.serving.routes import (
    ALLOWED,
    ALWAYS,
    METRICS,
    OF_A_MODEL,
    WITH_BODY,
    route_of,
    unknown_route,
)
from edge_node.serving.sessions import Session


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
        if route_of(path) not in ALLOWED:
            await refuse(send, 404, "NotFoundError", unknown_route(path))
        elif path == METRICS and self._are_elsewhere(gateway):
            text = "The metrics are at a port of their own (EDGE_SERVING__METRICS_PORT)."
            await refuse(send, 404, "NotFoundError", text)
        elif gateway is None:
            text = "The lorikeet plug-in of vLLM is not loaded."
            await refuse(send, 503, "ServiceUnavailableError", text)
        elif path not in ALWAYS and (reason := gateway.refusal()) is not None:
            await refuse(send, 503, "ServiceUnavailableError", reason)
        elif path in WITH_BODY and scope["method"] == "POST":
            most_mib = gateway.settings.serving.limits.body_mib
            most_bytes = math.inf if self._of_the_node else most_mib << 20
            body = await read_body(receive, most_bytes)
            if body is None:
                return
            if len(body) > most_bytes:
                text = (
                    f"The body is larger than {most_mib} MiB, the most this node reads "
                    "(EDGE_SERVING__LIMITS__BODY_MIB)."
                )
                await refuse(send, 413, "BadRequestError", text)
            elif path in OF_A_MODEL:
                completion = Completion(
                    gateway,
                    self._app,
                    scope,
                    receive,
                    send,
                    of_the_node=self._of_the_node,
                    session=self._session,
                )
                await completion.run(body)
            else:
                await self._app(scope, replay(body, receive), send)
        else:
            await self._app(scope, receive, send)

    def _are_elsewhere(self, gateway: Gateway | None) -> bool:
        """The metrics have a port of their own."""
        if gateway is None or self._of_the_node:
            return False
        return gateway.settings.serving.metrics_port is not None
