"""What one node may leave at central: updates in an hour, unfinished uploads, its own words.

Other nodes never notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_settings,
    reason,
    refusal,
    running_central,
)

LIMITS = {"node_updates_per_hour": 3, "node_unfinished": 4, "node_uploads": 2}


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with running_central(make_settings(tmp_path, limits=LIMITS)) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    return await central.enroll("a", await central.token())


async def test_a_node_has_so_many_updates_admitted_in_an_hour(central: Central, node: Node) -> None:
    other = await central.enroll("b", await central.token())
    payloads = [encode_factors(seed) for seed in range(4)]
    receipts = [await node.upload(payloads[n], node.manifest(payloads[n], n + 1)) for n in range(3)]
    code, why, text = await refusal(node.upload(payloads[3], node.manifest(payloads[3], 4)))
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_UPDATES")
    assert "CENTRAL_LIMITS__NODE_UPDATES_PER_HOUR" in text
    assert (
        await node.upload(payloads[0], node.manifest(payloads[0], 1)) == receipts[0]
    )  # a repeat is none more
    assert await other.upload(payloads[3])
    with central.rooms.journal.read() as state:
        assert len(state.updates_of(node.node_id)) == 3


async def test_updates_that_end_at_once_are_no_more_than_the_hour_allows(tmp_path: Path) -> None:
    """Each was within the bound when its upload began."""
    payloads = [encode_factors(seed) for seed in (1, 2)]
    settings = make_settings(tmp_path, limits=LIMITS | {"node_updates_per_hour": 1})
    async with running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        calls = [await node.begin(payload, n) for n, payload in enumerate(payloads, start=1)]
        ids = [node.manifest(payload, n).digest for n, payload in enumerate(payloads, start=1)]
        while not all(central.rooms.uploads.path(node.node_id, id).exists() for id in ids):
            await asyncio.sleep(0.01)
        for call in calls:
            await call.done_writing()
        results = await asyncio.gather(*calls, return_exceptions=True)
        (refused,) = (result for result in results if isinstance(result, grpc.aio.AioRpcError))
        assert reason(refused) == "TOO_MANY_UPDATES"
        late = results.index(refused)
        assert (await node.query(ids[late])).committed_bytes == len(payloads[late])
        with central.rooms.journal.read() as state:
            assert [update.update_id for update in state.updates_of(node.node_id)] == [
                ids[1 - late]
            ]


async def test_uploads_that_are_opened_and_never_fed_leave_nothing(
    central: Central, node: Node
) -> None:
    folder = central.settings.data_dir / "uploads" / node.node_id
    for seed in range(8):
        payload = encode_factors(seed)
        await refusal(node.upload(payload, node.manifest(payload, seed + 1), stop=0))
    assert not list(folder.iterdir())


async def test_a_node_has_so_many_unfinished_uploads_and_the_oldest_go(
    central: Central, node: Node
) -> None:
    folder = central.settings.data_dir / "uploads" / node.node_id
    manifests = []
    for seed in range(8):
        payload = encode_factors(seed)
        manifests.append(node.manifest(payload, seed + 1))
        await refusal(node.upload(payload, manifests[-1], stop=300))
    assert {path.stem for path in folder.iterdir()} == {
        manifest.digest for manifest in manifests[4:]
    }
    assert (await node.query(manifests[0].digest)).committed_bytes == 0
    assert (await node.query(manifests[7].digest)).committed_bytes == 300
    assert await node.upload(encode_factors(7), manifests[7], offset=300)


async def test_a_restart_keeps_to_the_bound(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, limits=LIMITS | {"node_unfinished": 8})
    async with running_central(settings) as central:
        token = await central.token()
        node = await central.enroll("a", token)
        for seed in range(8):
            payload = encode_factors(seed)
            await refusal(node.upload(payload, node.manifest(payload, seed + 1), stop=300))
    smaller = settings.model_copy(
        update={"limits": settings.limits.model_copy(update={"node_unfinished": 4})}
    )
    async with running_central(smaller) as central:
        again = await central.enroll("a", token, node.key)
        payload = encode_factors(8)
        await refusal(again.upload(payload, again.manifest(payload, 9), stop=300))
        assert len(list((settings.data_dir / "uploads" / node.node_id).iterdir())) == 4


@pytest.mark.parametrize("size", [10_000, 64_000])
async def test_a_manifest_is_as_long_as_the_base_needs(
    central: Central, node: Node, size: int
) -> None:
    payload = encode_factors()
    manifest = node.manifest(payload, metrics={f"{number:08}": 0.5 for number in range(size // 15)})
    code, why, text = await refusal(node.upload(payload, manifest))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "TOO_LARGE")
    assert f"The manifest has {len(manifest.to_bytes())} bytes" in text
    with central.rooms.journal.read() as state:
        assert not state.updates


async def test_a_header_with_thousands_of_tensors_is_not_read(node: Node) -> None:
    entries = ",".join(
        f'"t{n}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * n},{4 * n + 4}]}}'
        for n in range(5000)
    )
    header = f"{{{entries}}}".encode()
    payload = (len(header)).to_bytes(8, "little") + header + bytes(4 * 5000)
    code, why, text = await refusal(node.upload(payload))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_PAYLOAD")
    assert (
        f"The payload's header has {len(header)} bytes; for this base central reads at most" in text
    )
