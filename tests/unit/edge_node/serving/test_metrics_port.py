from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from edge_node.errors import ServingError
from edge_node.serving.metrics_port import MetricsPort
from edge_node.serving_settings import ServingSettings
from examples.ports import free_port
from tests.fakes.gateway import make_gateway
from tests.fakes.routes import App, Client


@pytest.fixture
async def port() -> AsyncIterator[int]:
    number = free_port()
    started = MetricsPort(ServingSettings(metrics_port=number), lambda: b"up 1\n")
    await started.start()
    yield number
    await started.aclose()


async def test_it_gives_the_metrics_without_a_key_and_nothing_else(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        answer = await http.get("/metrics")
        assert (answer.status_code, answer.text) == (200, "up 1\n")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert (await http.head("/metrics")).status_code == 200
        for path in ("/", "/v1/chat/completions", "/v1/models", "/ready"):
            assert (await http.get(path)).status_code == 404, path
        assert (await http.post("/metrics")).status_code == 405


async def test_a_taken_port_ends_the_start_with_its_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServingSettings(metrics_port=taken.getsockname()[1])
        with pytest.raises(ServingError, match="EDGE_SERVING__METRICS_PORT"):
            await MetricsPort(settings).start()


async def test_without_a_port_there_is_no_listener() -> None:
    unset = MetricsPort(ServingSettings())
    await unset.start()
    await unset.aclose()


@pytest.mark.parametrize(("metrics_port", "status"), [(None, 200), (9400, 404)])
async def test_the_endpoint_has_the_metrics_where_no_port_has(
    tmp_path: Path, metrics_port: int | None, status: int
) -> None:
    gateway = make_gateway(tmp_path)
    serving = gateway.settings.serving.model_copy(update={"metrics_port": metrics_port})
    gateway.settings = gateway.settings.model_copy(update={"serving": serving})
    client = Client(App(), gateway)
    await client.request("/metrics", method="GET")
    assert client.status == status


def test_the_metrics_cannot_have_the_port_of_the_endpoint() -> None:
    with pytest.raises(ValueError, match="the port of the endpoint"):
        ServingSettings(port=8000, metrics_port=8000)
