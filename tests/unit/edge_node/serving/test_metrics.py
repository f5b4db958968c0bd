"""What a scrape of a node shows, and what clients cannot make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from edge_node.figures import Family
from edge_node.serving.gateway import Gateway
from edge_node.serving.metrics import register
from tests.fakes.gateway import make_gateway, make_version
from tests.unit.edge_node.serving.test_access import Client
from tests.unit.edge_node.serving.test_middleware import V1

CHAT = "/v1/chat/completions"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    gateway = make_gateway(tmp_path)
    yield gateway
    gateway.recorder.close()


def scrape(gateway: Gateway) -> dict[str, float]:
    registry = CollectorRegistry()
    register(gateway, registry)
    return {
        " ".join((sample.name.removeprefix("lorikeet_node_"), *sample.labels.values())): (
            sample.value
        )
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }


async def test_answers_are_counted_by_route_status_and_version(
    gateway: Gateway, tmp_path: Path
) -> None:
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    client = Client(gateway)
    for _ in range(2):
        await client.ask(CHAT)
    for number in range(50):
        await client.ask(f"/no/such/route/{number}")
    gateway.counts.answered(CHAT, 503, None)
    gateway.counts.answered(CHAT, 200, V1.encode())
    gateway.counts.answered(CHAT, 200, b"lorikeet@v0-00000000")
    found = scrape(gateway)
    assert found[f"requests_total 200 {CHAT}"] == 4
    assert found[f"requests_total 503 {CHAT}"] == 1
    assert found["requests_total 200 other"] == 50
    assert len([name for name in found if name.startswith("requests_total")]) == 3
    assert found[f"answers_total {V1}"] == 1
    assert not [name for name in found if "v0-00000000" in name], "it is not loaded any more"


async def test_state_of_the_endpoint(gateway: Gateway, tmp_path: Path) -> None:
    assert scrape(gateway)["ready"] == 0
    await gateway.load(V1, make_version(tmp_path, "v1"))
    gateway.point(V1)
    gateway.aliases.enter(V1)
    gateway.aliases.enter("policy/r1@3")
    found = scrape(gateway)
    assert found["ready"] == 1
    assert found[f"requests_in_flight {V1}"] == 1
    assert found["requests_in_flight policy"] == 1
    assert found["capture_total lost"] == 0
    assert "supervisor_told_timestamp_seconds" not in found


async def test_what_the_supervisor_told_is_shown(gateway: Gateway) -> None:
    told = Family("lorikeet_node_problem", "gauge", "A room fails.", ("room",), ((("disk",), 1.0),))
    gateway.counts.tell([told])
    found = scrape(gateway)
    assert found["problem disk"] == 1
    assert found["supervisor_told_timestamp_seconds"] > 1.7e9
