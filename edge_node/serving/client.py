"""The node's own end of the control socket.

In: calls, and requests for the engine. Out: what the serving process answered. Guarantees: every
failure of a call is a ServingError that names the call; a path of any length works.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
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


@contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name of the socket `path` that the kernel takes, inside the block.

    Raises FileNotFoundError without its folder.
    """
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def socket_problem(path: Path) -> str | None:
    """Why no Unix socket can be made beside `path`; None when one can."""
    trial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with short_path(trial) as short, socket.socket(socket.AF_UNIX) as bound:
            bound.bind(short)
        trial.unlink()
    except OSError as error:
        return (
            f"No Unix socket can be made in {path.parent}: {error}. Set EDGE_DATA_DIR to a directory "
            "of a local file system; some network and desktop file systems have no sockets."
        )
    return None


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
    silent_s: float
    """How long the engine has made no token although one is waited for; 0 when all is well."""
    problems: list[Problem]


class ControlClient:
    """Opens a connection per call, so that it outlives restarts of the server."""

    def __init__(self, path: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._socket = path
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

    @asynccontextmanager
    async def requests(self, connections: int) -> AsyncIterator[httpx.AsyncClient]:
        """A client of vLLM's own routes that needs no key and has no deadline.

        connections: most that it opens.
        """
        limits = httpx.Limits(max_connections=connections)
        with short_path(self._socket) as path:
            transport = httpx.AsyncHTTPTransport(uds=path, limits=limits)
            async with httpx.AsyncClient(transport=transport, base_url="http://node", timeout=None) as client:
                yield client

    async def _call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None
    ) -> dict[str, Any]:
        deadline_s = timeout_s or self._timeout_s
        try:
            async with asyncio.timeout(deadline_s), self.requests(1) as client:
                response = await client.request(method, path, json=body)
        except TimeoutError as error:
            raise ServingError(
                f"vLLM did not answer {path} on its control socket {self._socket} within "
                f"{deadline_s:g} s. It hangs, or the machine is overloaded; the supervisor starts a "
                "vLLM that hangs again. See logs/vllm.log."
            ) from error
        except (httpx.HTTPError, OSError) as error:
            raise ServingError(
                f"vLLM's control socket {self._socket} did not answer {path}: {error or repr(error)}. vLLM is starting, "
                "or the node does not run: see logs/vllm.log, and start it with `edge-node serve`."
            ) from error
        if response.status_code == 409:
            raise ServingError(str(response.json()["error"]))
        if response.status_code != 200:
            raise ServingError(f"Control call {path} failed with HTTP {response.status_code}: {response.text[:200]}")
        answer: dict[str, Any] = response.json()
        return answer
