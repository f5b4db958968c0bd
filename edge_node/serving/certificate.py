"""A renewed certificate is served without a restart.

In: the files of EDGE_SERVING__TLS__*, and the TLS context that vLLM's server listens with. Out: the
context, which holds what the files hold. Guarantees: a pair that does not fit together, as while
one of both is written, changes nothing and is tried again; it is the problem of room `tls`.
Why not vLLM's own watch: it follows the file, not its name, so that it misses the second renewal of
a file that is replaced, as a Kubernetes Secret is.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_node.problems import Problems
from edge_node.serving import gateway as gateways

logger = logging.getLogger(__name__)

POLL_S = 5.0
LAUNCHER = "vllm.entrypoints.launchers.launcher"


def watch_certificates() -> None:
    """vLLM's server makes our watch from now on, where it would make its own."""
    launcher: Any = importlib.import_module(LAUNCHER)
    launcher.SSLCertRefresher = CertificateWatch


class CertificateWatch:
    """Stands for vLLM's SSLCertRefresher, whose arguments and `stop` these are."""

    def __init__(
        self,
        ssl_context: ssl.SSLContext,
        key_path: str | None = None,
        cert_path: str | None = None,
        ca_path: str | None = None,
        *,
        problems: Problems | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        self._context = ssl_context
        self._key, self._certificate, self._clients = key_path, cert_path, ca_path
        self._problems = problems or (gateways.here.problems if gateways.here else None)
        self._poll_s = poll_s
        self._seen = self._state()
        self._watching = asyncio.create_task(self._watch())

    def stop(self) -> None:
        self._watching.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            now = await asyncio.to_thread(self._state)
            if now == self._seen:
                continue
            try:
                await asyncio.to_thread(self._load)
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                self._report(error)
                continue
            self._seen = now
            logger.info("The endpoint's certificate was read again")
            if self._problems is not None:
                await asyncio.to_thread(self._problems.clear, "tls")

    def _state(self) -> Sequence[tuple[int, int, int] | None]:
        """What changes when a file is written or replaced."""
        return [_stat(path) for path in (self._certificate, self._key, self._clients) if path]

    def _load(self) -> None:
        """Into a context of its own first: a bad pair must not reach the one that serves."""
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self._context):
            # Empty: no question on the terminal.
            context.load_cert_chain(self._certificate or "", self._key, password="")
            if self._clients is not None:
                context.load_verify_locations(self._clients)

    def _report(self, error: Exception) -> None:
        if self._problems is not None:
            self._problems.report(
                "tls",
                f"The changed certificate {self._certificate} with key {self._key} cannot be "
                f"used: {error}. The one before is served on.",
                "Put a PEM certificate and its key, without a password, in these files; they are "
                "read again by themselves.",
            )


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
