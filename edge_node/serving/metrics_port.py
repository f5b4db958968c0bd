"""The port that Prometheus asks, inside vLLM's process.

In: GET /metrics, without a key. Out: the metrics as text; 404 for any other path. Guarantees: no
route of a model is here. It holds no prompt and no answer, but says how much is asked: so it is on
loopback, unless EDGE_SERVING__METRICS_HOST says otherwise.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from edge_node.errors import ServingError
from edge_node.serving.asgi import Message, Receive, Send, refuse
from edge_node.serving.embedded import EmbeddedServer
from edge_node.serving.metrics import metrics_text
from edge_node.serving.routes import METRICS
from edge_node.serving_settings import ServingSettings

TEXT_FORMAT = b"text/plain; version=0.0.4; charset=utf-8"


class MetricsPort:
    """start() once; ends with the process or with aclose()."""

    def __init__(self, serving: ServingSettings, text: Callable[[], bytes] = metrics_text) -> None:
        self._serving = serving
        self._text = text
        self._server: EmbeddedServer | None = None

    async def start(self) -> None:
        """Listens, where a port is set; raises ServingError when that fails."""
        host, port = self._serving.metrics_host, self._serving.metrics_port
        if port is None:
            return
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            bound = socket.create_server((host, port), family=family)
        except OSError as error:
            raise ServingError(
                f"The metrics cannot listen on {host}:{port}: {error}. Set "
                "EDGE_SERVING__METRICS_PORT to a free port, and EDGE_SERVING__METRICS_HOST to an "
                "address of this machine."
            ) from error
        self._server = EmbeddedServer(self._answer)
        await self._server.start(bound)

    async def aclose(self) -> None:
        if self._server is not None:
            await self._server.aclose()

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"] != METRICS:
            text = f"No route {scope['path']}. The only route of this port is {METRICS}."
            await refuse(send, 404, "NotFoundError", text)
            return
        if scope["method"] not in ("GET", "HEAD"):
            text = f"{scope['method']} is not possible here; expected GET."
            await refuse(send, 405, "BadRequestError", text)
            return
        body = await asyncio.to_thread(self._text)
        headers = [
            (b"content-type", TEXT_FORMAT),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
