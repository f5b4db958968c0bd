"""ControlClient against the real control server on a real Unix socket."""

from __future__ import annotations

import asyncio
import socket as sockets
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from edge_node.errors import ServingError
from edge_node.serving import ControlClient, socket_problem
from edge_node.serving.control import ControlServer
from edge_node.serving.gateway import Gateway
from edge_node.serving.middleware import LorikeetMiddleware
from edge_node.serving.plugin import _without_middleware
from edge_node.serving.session_port import SessionPort
from tests.fakes.endpoint import Outside
from tests.fakes.gateway import make_gateway, make_version

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"
CHAT = "/v1/chat/completions"


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return make_gateway(tmp_path)


@pytest.fixture(params=["short", "longer than a Unix socket's path may be " * 5])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param / "control.sock"


@pytest.fixture
async def socket(gateway: Gateway, path: Path) -> AsyncIterator[Path]:
    path.parent.mkdir()
    path.touch()  # left by a killed predecessor
    app = _without_middleware(guarded_vllm())
    server = ControlServer(
        gateway, path, LorikeetMiddleware(app, gateway), SessionPort(gateway, app)
    )
    await server.start()
    yield path
    await server.aclose()


def guarded_vllm() -> FastAPI:
    """Stands for vLLM's app: a route behind an authentication that lets nobody in."""
    app = FastAPI()

    async def complete(request: Request) -> JSONResponse:
        return JSONResponse({"model": (await request.json())["model"], "choices": []})

    app.add_api_route(CHAT, complete, methods=["POST"])

    app.add_middleware(Outside)
    return app


async def test_the_canary_and_the_own_adapter_are_loaded_versions_and_stay(
    gateway: Gateway, socket: Path, tmp_path: Path
) -> None:
    client = ControlClient(socket)
    await client.load(V1, make_version(tmp_path, "v1"))
    await client.load(V2, make_version(tmp_path, "v2"))
    await client.point(V1)
    for name, change in (("canary", client.canary), ("own", client.own)):
        assert getattr(await client.state(), name) is None
        with pytest.raises(ServingError, match="is not loaded"):
            await change("lorikeet@v9")
        await change(V2)
        assert getattr(await client.state(), name) == V2
        with pytest.raises(ServingError, match="before unloading it"):
            await client.unload(V2)
        await change(None)
    gateway.versions.leave(gateway.versions.enter(V2))
    assert set((await client.state()).versions) == {V2}
    assert (await client.state()).versions[V2]["requests"] == 1
    await client.unload(V2)
    assert (await client.state()).versions == {}


async def test_load_point_unload(gateway: Gateway, socket: Path, tmp_path: Path) -> None:
    client = ControlClient(socket)
    await client.load(V1, make_version(tmp_path, "v1"))
    await client.load(V1, tmp_path / "v1")
    await client.load(V2, make_version(tmp_path, "v2"))
    assert (await client.state()).not_ready == "No release is active yet."
    await client.point(V1)
    state = await client.state()
    assert (state.target, state.not_ready, state.base) == (V1, None, "base@01234567")
    assert state.loaded == {V1: tmp_path / "v1", V2: tmp_path / "v2"}
    await client.point(V2)
    await client.unload(V1)
    assert set((await client.state()).loaded) == {V2}
    assert await client.probe(5)


async def test_refusals_arrive_as_they_were_meant(socket: Path, tmp_path: Path) -> None:
    client = ControlClient(socket)
    with pytest.raises(ServingError, match="not a PEFT directory"):
        await client.load(V1, tmp_path / "absent")
    with pytest.raises(ServingError, match="is not loaded"):
        await client.point(V1)
    await client.load(V1, make_version(tmp_path, "v1"))
    await client.point(V1)
    with pytest.raises(ServingError, match="Point it at another version"):
        await client.unload(V1)


async def test_draining_waits_for_what_is_in_flight(gateway: Gateway, socket: Path) -> None:
    client = ControlClient(socket)
    gateway.aliases.enter("base@01234567")
    draining = asyncio.create_task(client.drain())
    while not (await client.state()).draining:
        await asyncio.sleep(0)
    assert (await client.state()).in_flight == {"base@01234567": 1}
    assert not draining.done()
    gateway.aliases.leave("base@01234567")
    await draining


async def test_only_this_user_may_steer(socket: Path) -> None:
    assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0


async def test_the_nodes_own_requests_pass_every_authentication(
    gateway: Gateway, socket: Path, tmp_path: Path
) -> None:
    client = ControlClient(socket)
    await client.load(V1, make_version(tmp_path, "v1"))
    await client.point(V1)
    async with client.requests(2) as vllm:
        answer = await vllm.post(
            CHAT, json={"model": "lorikeet", "messages": []}, headers={"x-lorikeet-capture": "off"}
        )
        assert (answer.status_code, answer.json()["model"], answer.headers["x-lorikeet-model"]) == (
            200,
            V1,
            V1,
        )
        assert (await vllm.post("/invocations", json={})).status_code == 404


async def test_no_server_is_a_serving_error(path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ServingError, match="did not answer /state") as caught:
            await ControlClient(path).state()
        assert "edge-node serve" in str(caught.value)
        path.parent.mkdir(exist_ok=True)


async def test_a_server_that_hangs_is_said_in_time(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with sockets.socket(sockets.AF_UNIX) as hanging:
        hanging.bind(str(path))
        hanging.listen()
        started = time.monotonic()
        with pytest.raises(ServingError, match=r"within 0.2 s. It hangs"):
            await ControlClient(path, timeout_s=0.2).state()
        assert time.monotonic() - started < 1.5


async def test_an_engine_that_makes_no_token_is_seen_in_the_state(
    gateway: Gateway, socket: Path
) -> None:
    waits = asyncio.Event()

    async def hang() -> None:
        waits.set()
        await asyncio.sleep(60)

    gateway.engine.probe = hang  # type: ignore[method-assign]
    client = ControlClient(socket)
    assert (await client.state()).silent_s == 0
    probe = asyncio.create_task(client.probe(0.3))
    await waits.wait()
    assert (await client.state()).silent_s > 0
    assert not await probe
    assert (await client.state()).silent_s == 0


def test_a_folder_without_sockets_is_said(path: Path) -> None:
    assert "Set EDGE_DATA_DIR" in (socket_problem(path) or "")
    path.parent.mkdir()
    assert socket_problem(path) is None
    assert list(path.parent.iterdir()) == []
