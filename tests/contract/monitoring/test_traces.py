"""Central's spans reach a real OTLP receiver; a collector that is away holds up nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from central.errors import SettingsError
from examples.ports import free_port
from tests.contract import central_harness as harness
from tests.contract.central_process import outside, process, ready
from tests.fakes.otlp import Collector


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


async def admit_one(settings: Any, endpoint: str) -> tuple[str, str]:
    """Central admits one update and stops; the update's id and central's log."""
    async with process(settings, "serve", TRACES__ENDPOINT=endpoint) as running:
        await ready(running)
        async with outside(settings) as central:
            node = await central.enroll("site-a", await central.token())
            data = harness.encode_factors()
            manifest = node.manifest(data)
            await node.upload(data, manifest)
        running.terminate()
        async with asyncio.timeout(40):
            log = (await running.communicate())[1].decode()
    assert running.returncode == 0, log
    return manifest.digest, log


async def test_an_admission_reaches_the_collector(tmp_path: Path, collector: Collector) -> None:
    update_id, _ = await admit_one(harness.make_settings(tmp_path), collector.address)
    assert collector.services == {"lorikeet-central"}
    [span] = [span for span in collector.spans if span.name == "admission"]
    assert span.trace_id.hex() == update_id[:32]
    assert span.parent_span_id.hex() == update_id[32:48]
    told = {pair.key for pair in span.attributes}
    assert told == {f"lorikeet.{n}" for n in ("update_id", "node_id", "cohort", "size_bytes")}


async def test_a_collector_that_is_away_holds_up_nothing(tmp_path: Path) -> None:
    await admit_one(harness.make_settings(tmp_path), f"http://127.0.0.1:{free_port()}")


async def test_a_bad_collector_is_refused_at_start(tmp_path: Path) -> None:
    settings = harness.make_settings(tmp_path)
    async with process(settings, "serve", TRACES__ENDPOINT="http://me:s3cret@c") as running:
        _, errors = await asyncio.wait_for(running.communicate(), 60)
    assert running.returncode == SettingsError.exit_code
    assert "CENTRAL_TRACES__ENDPOINT has a user name or a password" in errors.decode()
    assert "s3cret" not in errors.decode()
