"""The node's public port, which stays open when vLLM ends.

In: the serving settings. Out: one listening socket, which each vLLM in turn inherits, and a server
that answers 503 with Retry-After on it while there is none. Guarantees: no client is refused a
connection, and none that waits in the socket's queue is dropped, because one vLLM ended and
another one starts. Nothing is said here but that answer, so no key is asked for.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from edge_node import vllm_arguments
from edge_node.errors import ServingError
from edge_node.serving.embedded import EmbeddedServer
from edge_node.serving.endpoint import port_problem
from edge_node.serving_settings import ServingSettings

BACKLOG = 2048
"""As vLLM's own server has it."""
RETRY_AFTER_S = 5
TEXT = "vLLM is being started on this node. Send the request again, or to another node."


class Doorway:
    """open(); then answer() and leave() in turn; aclose(). On one event loop."""

    def __init__(self, serving: ServingSettings) -> None:
        self._serving = serving
        self._socket: socket.socket | None = None
        self._server: EmbeddedServer | None = None

    @property
    def fd(self) -> int:
        """File descriptor of the listening socket."""
        assert self._socket is not None
        return self._socket.fileno()

    def open(self) -> None:
        """Listens; raises ServingError when another program has the port."""
        host, port = self._serving.host, self._serving.port
        bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            bound.listen(BACKLOG)
        except OSError as error:
            bound.close()
            raise ServingError(
                port_problem(self._serving) or f"Cannot listen on {host}:{port}: {error}."
            ) from error
        self._socket = bound

    async def answer(self) -> None:
        """Every request gets 503 from now on; idempotent."""
        if self._server is not None or self._socket is None:
            return
        self._server = EmbeddedServer(_answer, log_level="warning", **_tls(self._serving))
        await self._server.start(self._socket.dup())

    async def leave(self) -> None:
        """Whoever else has the socket answers alone; idempotent."""
        server, self._server = self._server, None
        if server is not None:
            await server.aclose()

    async def aclose(self) -> None:
        await self.leave()
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _tls(serving: ServingSettings) -> dict[str, str]:
    """vLLM's own files, under uvicorn's names."""
    given = {
        "ssl_certfile": serving.tls.cert_file,
        "ssl_keyfile": serving.tls.key_file,
        "ssl_ca_certs": vllm_arguments.value(serving.extra_args, "--ssl-ca-certs"),
    }
    return {name: str(value) for name, value in given.items() if value is not None}


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    while True:  # an answer before the body's end would reset the connection
        message = await receive()
        if message["type"] != "http.request":
            return
        if not message.get("more_body", False):
            break
    error = {"message": TEXT, "type": "ServiceUnavailableError", "param": None, "code": 503}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
        (b"connection", b"close"),  # the next request shall meet vLLM
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
