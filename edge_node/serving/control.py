"""The control socket: how the supervisor steers vLLM from outside, on a Unix socket that only this user can open.

In: small JSON documents. Out: calls on the Gateway, answered with JSON; an error is 409 with its message.
Guarantees: runs on the server's own event loop, so an answer also shows that the loop is alive.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from edge_node.errors import EdgeError
from edge_node.serving.client import check_socket_path
from edge_node.serving.gateway import Gateway


class ControlServer:
    """start() once; ends with the process or with aclose()."""

    def __init__(self, gateway: Gateway, path: Path) -> None:
        self._gateway = gateway
        self._path = check_socket_path(path)
        app = web.Application(middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.get("/state", self._state),
                web.post("/load", self._load),
                web.post("/point", self._point),
                web.post("/unload", self._unload),
                web.post("/drain", self._drain),
                web.post("/probe", self._probe),
            ]
        )
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None)

    async def start(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)  # left by a killed predecessor
        await self._runner.setup()
        before = os.umask(0o177)
        try:
            await web.UnixSite(self._runner, str(self._path)).start()
        finally:
            os.umask(before)

    async def aclose(self) -> None:
        await self._runner.cleanup()

    async def _state(self, request: web.Request) -> web.Response:
        gateway, counts = self._gateway, self._gateway.recorder.counts()
        return web.json_response(
            {
                "alias": gateway.aliases.alias,
                "base": gateway.aliases.base,
                "target": gateway.aliases.target,
                "loaded": {name: str(path) for name, path in gateway.aliases.loaded.items()},
                "in_flight": dict(gateway.aliases.in_flight),
                "captured": counts.captured,
                "lost": counts.lost,
                "skipped": counts.skipped,
                "draining": gateway.draining,
                "not_ready": gateway.not_ready(),
                "problems": [asdict(problem) for problem in gateway.problems.unwritten()],
            }
        )

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        await self._gateway.load(body["name"], Path(body["path"]))
        return web.json_response({})

    async def _point(self, request: web.Request) -> web.Response:
        self._gateway.point((await request.json())["name"])
        return web.json_response({})

    async def _unload(self, request: web.Request) -> web.Response:
        await self._gateway.unload((await request.json())["name"])
        return web.json_response({})

    async def _drain(self, request: web.Request) -> web.Response:
        await self._gateway.drain()
        return web.json_response({})

    async def _probe(self, request: web.Request) -> web.Response:
        body = await request.json()
        return web.json_response({"alive": await self._gateway.probe(float(body["deadline_s"]))})


@web.middleware
async def _errors_as_json(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
        return response
    except EdgeError as error:
        return web.json_response({"error": str(error)}, status=409)
