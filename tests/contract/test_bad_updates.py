"""Updates that central does not take: each is refused with its reason and leaves nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import sign
from tests.contract import central_harness as harness
from tests.contract.central_harness import (
    DOWN_PROJ,
    Q_PROJ,
    Central,
    Node,
    encode_factors,
    refusal,
)


def bad_payload(change: str) -> bytes:
    modules = dict(harness.make_factors().modules)
    q = modules[Q_PROJ]
    if change == "NOT_FINITE":
        a = q.A.copy()
        a[0, 0] = np.nan
        modules[Q_PROJ] = replace(q, A=a)
    if change == "NORM_OUT_OF_BOUNDS":
        modules[Q_PROJ] = replace(q, scale=1e9)
    if change == "UNKNOWN_MODULE":
        modules["model.embed_tokens"] = q
    if change == "BAD_SHAPE":
        modules[DOWN_PROJ] = LoraModule(q.A, modules[DOWN_PROJ].B)
    if change == "RANK_TOO_LARGE":
        modules = dict(harness.make_factors(rank=3).modules)
    payload = encode(LoraTensors(modules))
    if change == "BAD_DTYPE":
        payload = payload.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1)
    if change == "MALFORMED_PAYLOAD":
        payload = b"PK\x03\x04" + payload
    if change == "UNKNOWN_SECTION":
        payload = encode(LoraTensors(modules, {"statistics": {"x": np.zeros(2, np.float32)}}))
    return payload


@pytest.mark.parametrize(
    "expected",
    [
        "NOT_FINITE",
        "NORM_OUT_OF_BOUNDS",
        "UNKNOWN_MODULE",
        "BAD_SHAPE",
        "RANK_TOO_LARGE",
        "BAD_DTYPE",
        "MALFORMED_PAYLOAD",
        "UNKNOWN_SECTION",
    ],
)
async def test_a_bad_payload_is_refused_and_leaves_nothing(
    central: Central, node: Node, expected: str
) -> None:
    payload = bad_payload(expected)
    code, why, text = await refusal(node.upload(payload))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, expected), text
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == 0
    with central.rooms.journal.read() as state:
        assert state.updates == {}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"base": "0" * 64}, "OTHER_BASE"),
        (
            {
                "start": {
                    "release": "0" * 64,
                    "payload": "0" * 64,
                    "prefix_rank": 0,
                    "dtype": "float32",
                }
            },
            "UNKNOWN_START",
        ),
        ({"rank": 5}, "RANK_TOO_LARGE"),
        ({"payload": {"digest_sha256": "0" * 64, "size_bytes": 1 << 40}}, "TOO_LARGE"),
        ({"payload": {"digest_sha256": "0" * 64, "size_bytes": 7000}}, "QUOTA_EXCEEDED"),
        ({"node_id": "b-00000000"}, "BAD_MANIFEST"),
        ({"sections": ["statistics"]}, "UNKNOWN_SECTION"),
        ({"metrics": {f"loss-{i}": 0.5 for i in range(10_000)}}, "TOO_LARGE"),
    ],
)
async def test_a_bad_manifest_is_refused(
    central: Central, node: Node, fields: dict[str, Any], expected: str
) -> None:
    payload = encode_factors()
    _, why, text = await refusal(node.upload(payload, node.manifest(payload, **fields)))
    assert why == expected, text


async def test_altered_bytes_are_refused(node: Node) -> None:
    payload = encode_factors()
    manifest = node.manifest(payload)
    altered = payload[:-1] + bytes([payload[-1] ^ 1])
    code, why, _ = await refusal(node.upload(altered, manifest))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "DIGEST_MISMATCH")
    _, why, _ = await refusal(node.upload(payload, manifest, signature=sign(node.key, b"other")))
    assert why == "BAD_SIGNATURE"
    _, why, _ = await refusal(node.upload(payload, manifest, stop=600))
    _, why, _ = await refusal(node.upload(altered, manifest, offset=600))
    assert why == "WRONG_OFFSET"  # not final: the earlier bytes may have been at fault
    assert (await node.query(manifest.digest)).committed_bytes == 0
    await node.upload(payload, manifest)


async def test_a_start_of_another_cohort_is_refused(central: Central, node: Node) -> None:
    foreign = await central.enroll("d", await central.token("zeta"))
    payload = encode_factors()
    start = foreign.manifest(payload).start
    code, why, told = await refusal(node.upload(payload, node.manifest(payload, start=start)))
    assert (code, why) == (grpc.StatusCode.FAILED_PRECONDITION, "UNKNOWN_START")
    absent = start.model_copy(update={"release": "0" * 64})
    _, _, same = await refusal(node.upload(payload, node.manifest(payload, start=absent)))
    # A release of another cohort is answered like one that does not exist.
    assert told.split("starts from")[1].replace(start.release, "") == same.split("starts from")[
        1
    ].replace("0" * 64, "")
