"""Stands for `ControlClient.requests` where a test answers the node's own requests over TCP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx


def at(url: str) -> Callable[[int], AbstractAsyncContextManager[httpx.AsyncClient]]:
    """Clients of the endpoint at `url`."""

    @asynccontextmanager
    async def requests(connections: int) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(
            base_url=url, timeout=None, limits=limits, trust_env=False
        ) as client:
            yield client

    return requests


class Outside:
    """A middleware of an operator that lets nobody in."""

    def __init__(self, app: Any) -> None:
        pass

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"nobody"})
