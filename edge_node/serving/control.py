"""The control socket: how the node reaches vLLM, on a Unix socket that only its user can open.

In: small JSON documents, and requests for vLLM's own routes. Out: calls on the Gateway, answered
with JSON (an error is 409 with its message), and vLLM's answers. Guarantees: a request here meets
no authentication, no TLS and no proxy, because the socket's file mode decides who may ask. It runs
on the server's own event loop, so an answer also shows that the loop is alive.
"""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from edge_node.errors import EdgeError, NotHeld, ServingError
from edge_node.figures import Family
from edge_node.serving.client import short_path
from edge_node.serving.embedded import EmbeddedServer
from edge_node.serving.gateway import Gateway
from edge_node.serving.session_port import SessionPort


class ControlServer:
    """start() once; ends with the process or with aclose()."""

    def __init__(self, gateway: Gateway, path: Path, requests: Any, sessions: SessionPort) -> None:
        """`requests`: the ASGI app that answers whatever is no control call."""
        self._gateway = gateway
        self._path = path
        self._requests = requests
        self._sessions = sessions
        routes = [
            Route("/state", self._state),
            Route("/load", self._load, methods=["POST"]),
            Route("/held", self._held, methods=["POST"]),
            Route("/point", self._point, methods=["POST"]),
            Route("/canary", self._canary, methods=["POST"]),
            Route("/own", self._own, methods=["POST"]),
            Route("/unload", self._unload, methods=["POST"]),
            Route("/drain", self._drain, methods=["POST"]),
            Route("/probe", self._probe, methods=["POST"]),
            Route("/figures", self._figures, methods=["POST"]),
            Route("/sessions/open", self._open_session, methods=["POST"]),
            Route("/sessions/take", self._take_session, methods=["POST"]),
        ]
        self._paths = frozenset(route.path for route in routes)
        self._control = Starlette(routes=routes, exception_handlers={EdgeError: _as_json})
        self._server = EmbeddedServer(self._app)

    async def start(self) -> None:
        """Returns when the socket answers."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # left by a killed predecessor
        await self._server.start(_bind(self._path))

    async def aclose(self) -> None:
        await self._sessions.aclose()
        await self._server.aclose()

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        app = self._control if scope["path"] in self._paths else self._requests
        await app(scope, receive, send)

    async def _state(self, request: Request) -> JSONResponse:
        gateway, counts = self._gateway, self._gateway.recorder.counts()
        return JSONResponse(
            {
                "alias": gateway.aliases.alias,
                "base": gateway.aliases.base,
                "target": gateway.aliases.target,
                "canary": gateway.aliases.canary,
                "own": gateway.aliases.own,
                "versions": gateway.versions.counts(),
                "loaded": {name: str(path) for name, path in gateway.aliases.loaded.items()},
                "in_flight": dict(gateway.aliases.in_flight),
                "captured": counts.captured,
                "lost": counts.lost,
                "skipped": counts.skipped,
                "draining": gateway.draining,
                "not_ready": gateway.not_ready(),
                "silent_s": gateway.silent_s(),
                "first_token_s": gateway.first_tokens.longest_s(),
                "problems": [asdict(problem) for problem in gateway.problems.unwritten()],
            }
        )

    async def _load(self, request: Request) -> JSONResponse:
        body = await request.json()
        proved = bool(body.get("proved", True))
        await self._gateway.load(body["name"], Path(body["path"]), proved=proved)
        return JSONResponse({})

    async def _held(self, request: Request) -> JSONResponse:
        try:
            await self._gateway.expect_held((await request.json())["name"])
        except NotHeld as error:
            return JSONResponse({"wrong": str(error)})
        return JSONResponse({"wrong": ""})

    async def _point(self, request: Request) -> JSONResponse:
        self._gateway.point((await request.json())["name"])
        return JSONResponse({})

    async def _canary(self, request: Request) -> JSONResponse:
        self._gateway.aliases.point_canary((await request.json())["name"])
        return JSONResponse({})

    async def _own(self, request: Request) -> JSONResponse:
        self._gateway.aliases.point_own((await request.json())["name"])
        return JSONResponse({})

    async def _unload(self, request: Request) -> JSONResponse:
        await self._gateway.unload((await request.json())["name"])
        return JSONResponse({})

    async def _drain(self, request: Request) -> JSONResponse:
        await self._gateway.drain()
        return JSONResponse({})

    async def _probe(self, request: Request) -> JSONResponse:
        body = await request.json()
        return JSONResponse({"alive": await self._gateway.probe(float(body["deadline_s"]))})

    async def _figures(self, request: Request) -> JSONResponse:
        try:
            told = [Family.read(document) for document in await request.json()]
        except (TypeError, ValueError) as error:
            raise ServingError(f"Figures are not usable: {error}.") from error
        self._gateway.counts.tell(told)
        return JSONResponse({})

    async def _open_session(self, request: Request) -> JSONResponse:
        url = await self._sessions.url()
        session = self._gateway.open_session(**await request.json())
        return JSONResponse({"base_url": url, "api_key": session.key, "model": session.model})

    async def _take_session(self, request: Request) -> JSONResponse:
        session = self._gateway.sessions.take((await request.json())["api_key"])
        return JSONResponse({"turns": session.turns()})


def _bind(path: Path) -> socket.socket:
    """A socket that listens at `path`, for this user only."""
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        with short_path(path) as short:
            bound.bind(short)
    except OSError:
        bound.close()
        raise
    finally:
        os.umask(before)
    return bound


def _as_json(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=409)
