"""The supervisor's end of the control socket.

In: calls. Out: what the serving process answered. Guarantees: every failure is a ServingError that names the call.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edge_node.errors import ServingError
from edge_node.problems import Problem

CONTROL_SOCKET_VARIABLE = "LORIKEET_CONTROL_SOCKET"
MAX_SOCKET_PATH_BYTES = 107
"""Of sockaddr_un on Linux, without the closing zero."""
CALL_TIMEOUT_S = 300
"""Deadline of every call: loading a large adapter on a busy host takes long, a hang must not last for ever."""


def check_socket_path(path: Path) -> Path:
    """Raises ServingError for a path that the kernel would cut off."""
    size = len(str(path).encode())
    if size > MAX_SOCKET_PATH_BYTES:
        raise ServingError(
            f"Control socket path {path} has {size} bytes; Unix sockets allow {MAX_SOCKET_PATH_BYTES}. "
            "Use a shorter EDGE_DATA_DIR."
        )
    return path


@dataclass(frozen=True)
class ControlState:
    """alias points at `target` (None: at nothing yet); not_ready: why /ready says 503, None when it says 200.

    problems: those of vLLM's process that the disk did not take, so that no file holds them.
    """

    alias: str
    base: str
    target: str | None
    loaded: dict[str, Path]
    in_flight: dict[str, int]
    captured: int
    lost: int
    skipped: int
    draining: bool
    not_ready: str | None
    problems: list[Problem]


class ControlClient:
    """Opens a connection per call, so that it outlives restarts of the server."""

    def __init__(self, socket: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._socket = check_socket_path(socket)
        self._timeout_s = timeout_s

    async def load(self, name: str, path: Path) -> None:
        """Loads the immutable PEFT directory `path` as alias@label; idempotent."""
        await self._call("POST", "/load", {"name": name, "path": str(path.absolute())})

    async def point(self, name: str) -> None:
        """The alias means `name` for every request that arrives from now on."""
        await self._call("POST", "/point", {"name": name})

    async def unload(self, name: str) -> None:
        """Returns when nothing is in flight on `name` and the engine has forgotten it; idempotent."""
        await self._call("POST", "/unload", {"name": name})

    async def drain(self) -> None:
        """New requests get 503; returns when the last answer has gone out."""
        await self._call("POST", "/drain", {})

    async def probe(self, deadline_s: float) -> bool:
        """Does the engine make tokens? Raises ServingError when not even the event loop answers in time."""
        answer = await self._call("POST", "/probe", {"deadline_s": deadline_s}, timeout_s=deadline_s + 5)
        return bool(answer["alive"])

    async def state(self) -> ControlState:
        answer = await self._call("GET", "/state")
        loaded = {name: Path(path) for name, path in answer["loaded"].items()}
        problems = [Problem(**fields) for fields in answer["problems"]]
        return ControlState(**{**answer, "loaded": loaded, "problems": problems})

    async def _call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        transport = httpx.AsyncHTTPTransport(uds=str(self._socket))
        try:
            async with httpx.AsyncClient(transport=transport, timeout=timeout_s or self._timeout_s) as client:
                response = await client.request(method, f"http://control{path}", json=body)
        except httpx.HTTPError as error:
            raise ServingError(
                f"vLLM's control socket {self._socket} did not answer {path}: {error!r}. See logs/vllm.log."
            ) from error
        if response.status_code == 409:
            raise ServingError(str(response.json()["error"]))
        if response.status_code != 200:
            raise ServingError(f"Control call {path} failed with HTTP {response.status_code}: {response.text[:200]}")
        answer: dict[str, Any] = response.json()
        return answer
