"""ControlClient against the real control server on a real Unix socket."""

from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_node.errors import ServingError
from edge_node.serving import ControlClient
from edge_node.serving.control import ControlServer
from edge_node.serving.gateway import Gateway
from tests.fakes.gateway import make_gateway, make_version

V1, V2 = "lorikeet@v1-aaaaaaaa", "lorikeet@v2-bbbbbbbb"


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return make_gateway(tmp_path)


@pytest.fixture
async def socket(gateway: Gateway) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as directory:  # short: tmp_path may be longer than a socket path
        path = Path(directory) / "control.sock"
        path.touch()  # left by a killed predecessor
        server = ControlServer(gateway, path)
        await server.start()
        yield path
        await server.aclose()


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


async def test_no_server_is_a_serving_error(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="did not answer /state"):
        await ControlClient(Path(tempfile.gettempdir()) / "lorikeet-absent.sock").state()
