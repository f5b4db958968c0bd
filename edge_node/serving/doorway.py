"""The node's public port, which stays open when vLLM ends.

In: the serving settings. Out: one listening socket, which each vLLM in turn inherits, and a server
that answers 503 with Retry-After on it while there is none. Guarantees: no client is refused a
connection, and none that waits in the socket's queue is dropped, because one vLLM ended and
another one starts. No client can keep the port from the next vLLM. TLS files that cannot be read
any more, as while they are renewed, leave those before in use. Nothing is said here but that
answer, so no key and no client's certificate is asked for.
"""

from __future__ import annotations

import logging
import socket
import ssl
from typing import Any

from edge_node.errors import ServingError
from edge_node.serving.anthropic_errors import in_anthropics_form
from edge_node.serving.asgi import REQUEST_ID, refuse, request_id_of
from edge_node.serving.embedded import EmbeddedServer
from edge_node.serving.endpoint import port_problem
from edge_node.serving.routes import ANTHROPIC
from edge_node.serving_settings import ServingSettings

logger = logging.getLogger(__name__)

BACKLOG = 2048
"""As vLLM's own server has it."""
LEAVE_S = 2
"""How long a client may take to hear its 503 when vLLM serves again."""
TEXT = "vLLM is being started on this node. Send the request again, or to another node."


class Doorway:
    """open(); then answer() and leave() in turn; aclose(). On one event loop."""

    def __init__(self, serving: ServingSettings) -> None:
        self._serving = serving
        self._socket: socket.socket | None = None
        self._server: EmbeddedServer | None = None
        self._tls: ssl.SSLContext | None = None

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
        self._server = EmbeddedServer(
            _answer, self._context(), log_level="critical", timeout_graceful_shutdown=LEAVE_S
        )
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

    def _context(self) -> ssl.SSLContext | None:
        """Of the node's certificate as it is now, or as it was when it could be read."""
        files = self._serving.tls
        if files.cert_file is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Empty: no question on the terminal.
            context.load_cert_chain(files.cert_file, files.key_file, password="")
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            if self._tls is None:
                raise ServingError(
                    f"The certificate {files.cert_file} with key {files.key_file} cannot be "
                    f"used: {error}. Put a PEM certificate and its key, without a password, there."
                ) from error
            logger.warning("The certificate cannot be read", extra={"cause": repr(error)})
            return self._tls
        self._tls = context
        return context


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    while True:  # an answer before the body's end would reset the connection
        message = await receive()
        if message["type"] != "http.request":
            return
        if not message.get("more_body", False):
            break
    if scope["path"] in ANTHROPIC:
        send = in_anthropics_form(send)
    ids = [(REQUEST_ID, request_id_of(scope))]
    await refuse(send, 503, "ServiceUnavailableError", TEXT, headers=ids)
