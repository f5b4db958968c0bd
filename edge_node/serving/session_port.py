"""The endpoint of agents: a port of this machine alone, inside vLLM's process.

In: requests of an agent's run, whose API key is that of its session. Out: vLLM's answers.
Guarantees: it listens on loopback, at a port that the kernel chooses, from the first session on.
Without the key of an open session it answers 401. An agent meets no TLS and no key of the public
port.
"""

from __future__ import annotations

import asyncio
import socket

from edge_node.serving.asgi import App, Message, Receive, Send, refuse
from edge_node.serving.embedded import EmbeddedServer
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.routes import COMPLETIONS

LOOPBACK = "127.0.0.1"
BEARER = b"bearer "


class SessionPort:
    """url() starts it at its first call; aclose() ends it."""

    def __init__(self, gateway: Gateway, app: App) -> None:
        """`app`: vLLM's, without its authentication."""
        self._gateway = gateway
        self._app = app
        self._starting = asyncio.Lock()
        self._server: EmbeddedServer | None = None
        self._url = ""

    async def url(self) -> str:
        """What an agent takes for `base_url`."""
        async with self._starting:
            if self._server is None:
                bound = socket.create_server((LOOPBACK, 0))
                server = EmbeddedServer(self._answer)
                await server.start(bound)
                self._server = server
                self._url = f"http://{LOOPBACK}:{bound.getsockname()[1]}/v1"
        return self._url

    async def aclose(self) -> None:
        if self._server is not None:
            await self._server.aclose()

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        session = self._gateway.sessions.find(_key(scope))
        if session is None:
            text = "No open session has this API key: expected the one that `run` was given."
            await refuse(send, 401, "AuthenticationError", text)
        elif scope["path"] not in COMPLETIONS:
            routes = ", ".join(sorted(COMPLETIONS))
            text = f"No route {scope['path']}. Routes of a session: {routes}."
            await refuse(send, 404, "NotFoundError", text)
        else:
            middleware = LorikeetMiddleware(
                self._app, self._gateway, of_the_node=True, session=session
            )
            await middleware(scope, receive, send)


def _key(scope: Message) -> str:
    """The API key of a request; empty without one."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[: len(BEARER)].lower() == BEARER:
            return str(value[len(BEARER) :].strip().decode("latin-1"))
    return ""
