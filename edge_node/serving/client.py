"""The node's own end of the control socket.

In: calls, and requests for the engine. Out: what the serving process answered. Guarantees: every
failure of a call is a ServingError that names the call; a path of any length works.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edge_node.errors import NotHeld, ServingError
from edge_node.problems import Problem
from edge_node.serving.aliases import PRIVATE

CONTROL_SOCKET_VARIABLE = "LORIKEET_CONTROL_SOCKET"
MAX_SOCKET_PATH_BYTES = 107
"""Of sockaddr_un on Linux, without the closing zero."""
CALL_TIMEOUT_S = 300
"""Deadline of every call: loading a large adapter takes long, a hang must end."""


def control_socket(data_dir: Path) -> Path:
    """vLLM's control socket. Every process of the node finds it here, whatever its TMPDIR is."""
    return data_dir / "control.sock"


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
            f"No Unix socket can be made in {path.parent}: {error}. Set EDGE_DATA_DIR to a "
            "directory of a local file system; some network and desktop file systems have no "
            "sockets."
        )
    return None


@dataclass(frozen=True)
class ControlState:
    """target: what the alias points at, None at first. not_ready: why /ready says 503, or None.

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
    first_token_s: float
    """Longest time that a stream of a user waited for its first piece, of late; or 0."""
    problems: list[Problem]
    canary: str | None = None
    """What a share of the alias's requests means; None: there is no canary here."""
    own: str | None = None
    """The node's own adapter, where a policy serves it; None: there is none."""
    versions: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each version since vLLM's start: `requests`, `errors` and `seconds`."""

    def users_in_flight(self) -> int:
        """Requests on releases and on the base; the learner's own are left out."""
        return sum(count for name, count in self.in_flight.items() if not name.startswith(PRIVATE))


@dataclass(frozen=True)
class SessionAccess:
    """What an agent's run is given; `api_key` is a secret, good for this session alone."""

    base_url: str
    api_key: str
    model: str


@dataclass(frozen=True)
class Turn:
    """One answer in a session, in token ids. logprobs: of each of `answer_ids`, natural.

    text_only: False for a prompt with images, audio, video or embeddings.
    """

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]
    logprobs: Sequence[float]
    text_only: bool = True


class ControlClient:
    """Opens a connection per call, so that it outlives restarts of the server."""

    def __init__(self, path: Path, *, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._socket = path
        self._timeout_s = timeout_s

    async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
        """Loads the immutable PEFT directory `path` as alias@label; idempotent.

        `proved`: False hides a new version from clients until `expect_held`.
        """
        body = {"name": name, "path": str(path.absolute()), "proved": proved}
        await self._call("POST", "/load", body)

    async def expect_held(self, name: str) -> None:
        """Raises NotHeld unless vLLM's workers hold the version `name` as its directory has it."""
        answer = await self._call("POST", "/held", {"name": name})
        if answer["wrong"]:
            raise NotHeld(answer["wrong"])

    async def point(self, name: str) -> None:
        """The alias means `name` for every request that arrives from now on."""
        await self._call("POST", "/point", {"name": name})

    async def canary(self, name: str | None) -> None:
        """A share of the alias's requests means `name` from now on; None: no request does."""
        await self._call("POST", "/canary", {"name": name})

    async def own(self, name: str | None) -> None:
        """The node's own adapter is `name`, until the alias points elsewhere; None: none is."""
        await self._call("POST", "/own", {"name": name})

    async def unload(self, name: str) -> None:
        """Returns when no request uses `name` and the engine has forgotten it; idempotent."""
        await self._call("POST", "/unload", {"name": name})

    async def drain(self) -> None:
        """New requests get 503; returns when the last answer has gone out."""
        await self._call("POST", "/drain", {})

    async def probe(self, deadline_s: float) -> bool:
        """Does the engine make tokens? Raises ServingError when the event loop does not answer."""
        answer = await self._call(
            "POST", "/probe", {"deadline_s": deadline_s}, timeout_s=deadline_s + 5
        )
        return bool(answer["alive"])

    async def tell_figures(self, families: list[dict[str, Any]], *, timeout_s: float) -> None:
        """The supervisor's figures (edge_node/figures), for the next scrapes."""
        await self._call("POST", "/figures", families, timeout_s=timeout_s)

    async def open_session(
        self,
        model: str,
        *,
        seed: int,
        temperature: float,
        max_answer_tokens: int | None,
        lasts_s: float,
    ) -> SessionAccess:
        """A session on the loaded version `model`, which vLLM forgets after `lasts_s` seconds.

        Its answers are sampled with `seed` and `temperature`, whatever a request says, and have at
        most `max_answer_tokens`; None: as many as the request says, or the model takes.
        """
        body = {
            "model": model,
            "seed": seed,
            "temperature": temperature,
            "max_answer_tokens": max_answer_tokens,
            "lasts_s": lasts_s,
        }
        return SessionAccess(**await self._call("POST", "/sessions/open", body))

    async def take_session(self, api_key: str) -> list[Turn]:
        """Ends a session and gives its turns, oldest first: vLLM has them no longer."""
        answer = await self._call("POST", "/sessions/take", {"api_key": api_key})
        return [Turn(**turn) for turn in answer["turns"]]

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
            # There is no TLS here, and a context of trusted certificates costs 20 ms of CPU.
            transport = httpx.AsyncHTTPTransport(uds=path, limits=limits, verify=False)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://node", timeout=None
            ) as client:
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
                f"{deadline_s:g} s. It hangs, or the machine is overloaded; the supervisor starts "
                "a vLLM that hangs again. See logs/vllm.log."
            ) from error
        except (httpx.HTTPError, OSError) as error:
            raise ServingError(
                f"vLLM's control socket {self._socket} did not answer {path}: "
                f"{error or repr(error)}. vLLM is starting, or the node does not run: see "
                "logs/vllm.log, and start it with `edge-node serve`."
            ) from error
        if response.status_code == 409:
            raise ServingError(str(response.json()["error"]))
        if response.status_code != 200:
            raise ServingError(
                f"Control call {path} failed with HTTP {response.status_code}: "
                f"{response.text[:200]}"
            )
        answer: dict[str, Any] = response.json()
        return answer
