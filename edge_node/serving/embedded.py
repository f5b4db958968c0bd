"""A server of our own on an event loop that has other work: that of vLLM's server, or the node's.

In: an ASGI app and a bound socket. Out: answers. Guarantees: it takes no signal, writes no log and
trusts no header about who asks.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

KEEP_ALIVE_S = 75
"""Longer than a client keeps an idle connection, as at vLLM's own port."""


class EmbeddedServer:
    """start() once; ends with the process or with aclose()."""

    def __init__(self, app: Any, tls: ssl.SSLContext | None = None, **more: Any) -> None:
        """`tls`: None speaks plain HTTP. `more`: further settings of uvicorn's."""
        config = uvicorn.Config(
            app, interface="asgi3", ws="none", lifespan="off", proxy_headers=False,
            log_config=None, access_log=False, timeout_keep_alive=KEEP_ALIVE_S, **more,
        )  # fmt: skip
        if tls is not None:
            config.load()
            config.ssl = tls
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, bound: socket.socket) -> None:
        """Returns when `bound` answers."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[bound]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0)
        if self._serving.done():
            self._serving.result()

    async def aclose(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are for the process around it
