"""A payload that was lost comes again: a cut upload goes on, and what was given up stays away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from central.journal import EventKind, NewEvent
from central.settings import CentralSettings
from protos.manifest import UpdateManifest
from protos.updates.v1 import updates_pb2
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_settings,
    running_central,
)

PAYLOAD = encode_factors()
CAME = 500
"""Bytes of the payload that came before central stopped."""


@pytest.fixture
def settings(tmp_path: Path) -> CentralSettings:
    return make_settings(tmp_path, retention={"set_aside_days": 0})


@pytest.fixture
async def central(settings: CentralSettings) -> AsyncIterator[Central]:
    async with running_central(settings) as running:
        yield running


async def lose(central: Central, node: Node) -> tuple[UpdateManifest, updates_pb2.Receipt]:
    """An update that is admitted, and whose payload is gone."""
    manifest, receipt = node.manifest(PAYLOAD), await node.upload(PAYLOAD)
    central.rooms.blobs.delete(manifest.payload.digest_sha256)
    body = {"reason": "its blob is gone", "lost": True}
    event = NewEvent(EventKind.UPDATE_SET_ASIDE, "shared", manifest.digest, body)
    await asyncio.to_thread(central.rooms.journal.append, event)
    return manifest, receipt


async def test_a_cut_upload_of_a_lost_payload_goes_on_after_a_restart(
    settings: CentralSettings,
) -> None:
    async with running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        manifest, _ = await lose(central, node)
        call = await node.begin(PAYLOAD, 1, CAME)
        await asyncio.sleep(0.3)  # the piece is here
        call.cancel()
        assert (await node.query(manifest.digest)).committed_bytes == CAME
    async with running_central(settings) as central:
        uploads = central.rooms.uploads
        assert await asyncio.to_thread(uploads.committed, node.node_id, manifest.digest) == CAME


async def test_bytes_that_retention_gave_up_are_not_asked_for_again(central: Central) -> None:
    node = await central.enroll("a", await central.token())
    manifest, receipt = await lose(central, node)
    collected = await asyncio.to_thread(central.rooms.collector.collect, "a test")
    assert len(collected.blobs) == 1
    answer = await node.query(manifest.digest)
    assert (answer.receipt, answer.state) == (receipt, updates_pb2.UPDATE_STATE_SET_ASIDE)
    assert await node.upload(PAYLOAD) == receipt
    assert manifest.payload.digest_sha256 not in central.rooms.blobs
