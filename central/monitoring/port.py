"""The port on which Prometheus reads central's figures: plain HTTP, GET alone.

In: a registry, an address. Out: the text of every figure at each request, made in a thread of its
own. Guarantees: it takes nothing from a caller but a path; a silent connection ends.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from central.errors import ListenError

SILENCE_S = 10.0
"""A connection that sends nothing for so long is closed."""
AT_ONCE = 8
"""Requests that are answered at once; further ones wait in the kernel's queue."""
PATH = "/metrics"


@contextmanager
def metrics_port(registry: CollectorRegistry, host: str, port: int) -> Iterator[str]:
    """Answer until the block ends; gives the address. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (_Server,), {"address_family": family})
    try:
        server = kind((host, port), _handler(registry))
    except OSError as error:
        raise ListenError(
            f"Central cannot serve metrics on {host}:{port}: {error.strerror or error}. Stop the "
            "program that has the port, or set CENTRAL_LISTEN__METRICS_PORT or "
            "CENTRAL_LISTEN__METRICS_HOST."
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.server_address[1]}{PATH}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: object) -> None:
        self._places = threading.BoundedSemaphore(AT_ONCE)
        super().__init__(*arguments)  # type: ignore[arg-type]

    def process_request(self, request: object, client_address: object) -> None:
        self._places.acquire()
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def process_request_thread(self, request: object, client_address: object) -> None:
        try:
            super().process_request_thread(request, client_address)  # type: ignore[arg-type]
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that hangs up is no news."""


def _handler(registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = SILENCE_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self._answer(404, f"Central's figures are at {PATH}.\n".encode(), "text/plain")
                return
            self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """A scrape every few seconds is no news either."""

    return Handler
