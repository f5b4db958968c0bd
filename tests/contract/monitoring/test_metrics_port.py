"""The port for Prometheus: what it answers, who can hold it up, and what `central serve` shows."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

from central.errors import ListenError
from central.monitoring import port as ports
from central.monitoring.port import metrics_port
from examples.ports import free_port
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("answer", "A number.", registry=registry).set(42)
    return registry


def test_it_answers_one_path_and_one_method(registry: CollectorRegistry) -> None:
    with metrics_port(registry, "127.0.0.1", free_port()) as address:
        with urlopen(address, timeout=10) as answer:
            assert b"answer 42.0" in answer.read()
            assert answer.headers["Content-Type"].startswith("text/plain")
        for request in (
            Request(address.replace("/metrics", "/")),
            Request(address, data=b"x", method="POST"),
        ):
            with pytest.raises(HTTPError):
                urlopen(request, timeout=10)
    with pytest.raises(OSError, match="refused"):
        urlopen(address, timeout=10)


def test_a_port_that_is_taken_is_said(registry: CollectorRegistry) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ListenError, match="CENTRAL_LISTEN__METRICS_PORT"),
        metrics_port(registry, "127.0.0.1", taken.getsockname()[1]),
    ):
        pass


def test_silent_connections_end(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "SILENCE_S", 0.3)
    with metrics_port(registry, "127.0.0.1", port := free_port()) as address:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * ports.AT_ONCE)]
        began = time.monotonic()
        with urlopen(address, timeout=10) as answer:
            assert answer.status == 200
        assert time.monotonic() - began < 5
        for connection in silent:
            connection.close()


async def test_central_serves_them_where_a_port_is_set(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    port = free_port()
    variables = {"LISTEN__METRICS_PORT": str(port), "LOGS__FORMAT": "json"}
    async with process(settings, "serve", **variables) as running:
        await ready(running)
        async with outside(settings) as central:
            await central.enroll("site-a", await central.token())
            text = await asyncio.to_thread(scrape, port)
        running.terminate()
        lines = (await running.communicate())[1].decode().splitlines()
    assert {"event recorded", "metrics are served"} <= {json.loads(one)["message"] for one in lines}
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["lorikeet_central_nodes", "shared", "away"] == 1
    assert found["lorikeet_central_channel_version", "stable", "shared"] == 0
    assert found["lorikeet_central_calls_total", "EnrollmentService/Enroll", "OK"] == 1
    assert found["lorikeet_central_journal_bytes",] > 0
    assert found["process_open_fds",] > 0
    assert "site-a" not in text


def scrape(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())
