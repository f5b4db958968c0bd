"""A node's settings, and a node that serves as far as control socket and port show it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edge_node.serving import control_socket
from edge_node.serving.control import ControlServer
from edge_node.serving.session_port import SessionPort
from edge_node.settings import BaseModelSettings, EdgeSettings, ServingSettings
from examples.ports import free_port
from protos.base import read_base_model
from tests.contract.central_harness import make_base
from tests.fakes.endpoint import Outside
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.identity import make_identity

V1 = "lorikeet@v1-aaaaaaaa"


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    """Of an enrolled node on a free port."""
    base = make_base(tmp_path / "base")
    make_identity(tmp_path / "node", read_base_model(base).digest)
    return EdgeSettings(
        data_dir=tmp_path / "node",
        base=BaseModelSettings(path=base),
        serving=ServingSettings(port=free_port()),
    )


@pytest.fixture
async def running(settings: EdgeSettings, tmp_path: Path) -> AsyncIterator[EdgeSettings]:
    """A node that serves V1, as far as control socket and port show it."""
    gateway = make_gateway(tmp_path / "vllm")
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    outside = Outside(None)
    server = ControlServer(
        gateway, control_socket(settings.data_dir), outside, SessionPort(gateway, outside)
    )
    await server.start()
    with socket.create_server(("127.0.0.1", settings.serving.port)):
        yield settings
    await server.aclose()
