"""Uploads and watches that a node may have open at real servers: a faulty site holds neither slots nor memory for ever."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from protos.fleet.v1 import fleet_pb2
from protos.manifest import sign
from protos.updates.v1 import updates_pb2
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_settings,
    reason,
    refusal,
    running_central,
)

LIMITS = {"node_uploads": 2, "node_watches": 2, "upload_idle_s": 1.0}


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with running_central(make_settings(tmp_path, limits=LIMITS)) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    return await central.enroll("a", await central.token())


async def begin(node: Node, payload: bytes, sequence: int, sent: int) -> grpc.aio.StreamUnaryCall:
    """An upload that sends `sent` bytes and then nothing."""
    data = node.manifest(payload, sequence).to_bytes()
    call = node.updates.Upload(timeout=20)
    header = updates_pb2.UploadHeader(manifest=data, signature=sign(node.key, data), offset=0)
    await call.write(updates_pb2.UploadRequest(header=header))
    await call.write(updates_pb2.UploadRequest(chunk=payload[:sent]))
    return call


async def test_a_silent_upload_ends_and_goes_on_from_its_last_byte(node: Node) -> None:
    payload = encode_factors()
    call = await begin(node, payload, 1, 500)
    code, why, text = await refusal(call)
    assert (code, why) == (grpc.StatusCode.ABORTED, "SILENT_STREAM")
    assert "of which 500 bytes are here" in text
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == 500
    assert await node.upload(payload, offset=500)


async def test_an_upload_without_a_header_ends_too(node: Node) -> None:
    call = node.updates.Upload(timeout=20)
    assert (await refusal(call))[1] == "SILENT_STREAM"


async def test_a_node_may_have_so_many_uploads_open_and_holds_up_no_other(central: Central, node: Node) -> None:
    other = await central.enroll("b", await central.token())
    payload = encode_factors()
    silent = [await begin(node, encode_factors(seed), seed, 500) for seed in (1, 2)]
    ids = [node.manifest(encode_factors(seed), seed).digest for seed in (1, 2)]
    while not all(central.rooms.partial.path(node.node_id, update_id).exists() for update_id in ids):
        await asyncio.sleep(0.01)
    code, why, text = await refusal(node.upload(payload))
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert "CENTRAL_LIMITS__NODE_UPLOADS" in text
    assert await other.upload(payload)
    for call in silent:
        await refusal(call)
    assert await node.upload(payload)


async def refused(watch: grpc.aio.UnaryStreamCall) -> str | None:
    """Why the watch was refused, None when it lives."""
    try:
        await watch.read()
    except grpc.aio.AioRpcError as error:
        return reason(error)
    return None


async def test_a_node_may_have_so_many_watches_open(node: Node) -> None:
    watches = [node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20) for _ in range(2)]
    assert [await refused(watch) for watch in watches] == [None, None]
    code, why, text = await refusal(node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20).read())
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert "CENTRAL_LIMITS__NODE_WATCHES" in text
    watches[0].cancel()
    async with asyncio.timeout(10):  # until central has noticed
        while await refused(node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)):
            await asyncio.sleep(0.01)
