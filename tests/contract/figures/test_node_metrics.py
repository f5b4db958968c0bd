"""From a node's stores over the real control socket into a scrape."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from edge_node.errors import ServingError
from edge_node.experience import ExperienceStore
from edge_node.figures import Tally
from edge_node.figures.gather import Gatherer, tell
from edge_node.identity import Identity
from edge_node.outbox import Outbox
from edge_node.problems import Problems
from edge_node.serving import ControlClient, control_socket
from edge_node.serving.control import ControlServer
from edge_node.serving.metrics import register
from edge_node.serving.session_port import SessionPort
from tests.fakes.endpoint import Outside
from tests.fakes.gateway import make_gateway
from tests.fakes.node_data import make_node


async def test_the_supervisors_figures_reach_a_scrape_and_follow_the_stores(
    tmp_path: Path,
) -> None:
    settings = make_node(tmp_path / "node")
    folder = settings.data_dir
    gateway = make_gateway(folder)
    registry = CollectorRegistry()
    register(gateway, registry)
    outside = Outside(None)
    socket = control_socket(folder)
    server = ControlServer(gateway, socket, outside, SessionPort(gateway, outside))
    gatherer = Gatherer(
        folder,
        Identity.load(folder),
        SimpleNamespace(generation=1),
        Outbox(folder / "outbox", "auto"),
        ExperienceStore(folder / "experience.db"),
        Tally(),
    )
    telling = asyncio.create_task(tell(gatherer.families, ControlClient(socket), 0.05))
    await asyncio.sleep(0.2)  # nobody listens yet: it goes on
    await server.start()
    try:
        await until(lambda: b"lorikeet_node_problems 0.0" in generate_latest(registry))
        Problems(folder).report("disk", "It is nearly full.", "Free some.")
        line = b'lorikeet_node_problem{room="disk"} 1.0'
        await until(lambda: line in generate_latest(registry))
        with pytest.raises(ServingError, match="malformed"):
            await ControlClient(socket).tell_figures([{"name": "x"}], timeout_s=5)
        async with ControlClient(socket).requests(1) as client:
            answer: httpx.Response = await client.post("/figures", content=b"no json")
        assert answer.status_code == 409
        assert line in generate_latest(registry), "what is refused changes nothing"
    finally:
        telling.cancel()
        await server.aclose()
        gateway.recorder.close()


async def until(holds: object) -> None:
    async with asyncio.timeout(10):
        while not holds():  # type: ignore[operator]
            await asyncio.sleep(0.02)
