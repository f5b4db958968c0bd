"""Streams that no node of ours sends: each is refused with its reason, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from central.intake.service import MAX_CHUNK_BYTES
from protos.manifest import sign
from protos.updates.v1 import updates_pb2
from tests.contract.central_harness import Central, Node, encode_factors, refusal

PAYLOAD = encode_factors()
FINAL = grpc.StatusCode.INVALID_ARGUMENT


def header_of(node: Node, **fields: Any) -> updates_pb2.UploadRequest:
    data = node.manifest(PAYLOAD, **fields).to_bytes()
    header = updates_pb2.UploadHeader(manifest=data, signature=sign(node.key, data))
    return updates_pb2.UploadRequest(header=header)


def chunk(data: bytes) -> updates_pb2.UploadRequest:
    return updates_pb2.UploadRequest(chunk=data)


def parts(what: str, node: Node) -> Iterable[updates_pb2.UploadRequest]:
    if what == "nothing at all":
        return []
    if what == "a chunk before the header":
        return [chunk(PAYLOAD)]
    if what == "an empty request":
        return [updates_pb2.UploadRequest()]
    if what == "another start's payload":
        other = node.manifest(PAYLOAD).start.model_copy(update={"payload": "0" * 64})
        return [header_of(node, start=other)]
    if what == "a prefix that its start has not":
        wrong = node.manifest(PAYLOAD).start.model_copy(update={"prefix_rank": 7})
        return [header_of(node, start=wrong)]
    if what == "a manifest that is none":
        header = updates_pb2.UploadHeader(manifest=b"{}", signature=sign(node.key, b"{}"))
        return [updates_pb2.UploadRequest(header=header)]
    chunks = {
        "an empty chunk": [PAYLOAD[:5], b""],
        "a chunk of more than 1 MiB": [bytes(MAX_CHUNK_BYTES + 1)],
        "more than its manifest says": [PAYLOAD, b"x"],
        "two headers": [PAYLOAD[:5]],
    }
    again = [header_of(node)] if what == "two headers" else []
    return [header_of(node), *map(chunk, chunks[what]), *again]


@pytest.mark.parametrize(
    ("what", "status", "expected", "text"),
    [
        ("nothing at all", FINAL, "BAD_ARGUMENT", "begins with its header"),
        ("a chunk before the header", FINAL, "BAD_ARGUMENT", "begins with its header"),
        ("an empty request", FINAL, "BAD_ARGUMENT", "begins with its header"),
        ("an empty chunk", FINAL, "BAD_ARGUMENT", "has 0 bytes; expected 1 to 1048576"),
        ("two headers", FINAL, "BAD_ARGUMENT", "has 0 bytes; expected 1 to 1048576"),
        ("a chunk of more than 1 MiB", FINAL, "BAD_ARGUMENT", "has 1048577 bytes"),
        ("more than its manifest says", FINAL, "TOO_LARGE", f"after the {len(PAYLOAD)} bytes"),
        ("a manifest that is none", FINAL, "BAD_MANIFEST", "Expected protos.manifest"),
        (
            "another start's payload",
            grpc.StatusCode.FAILED_PRECONDITION,
            "UNKNOWN_START",
            "Download the release again",
        ),
        (
            "a prefix that its start has not",
            grpc.StatusCode.FAILED_PRECONDITION,
            "UNKNOWN_START",
            "with prefix rank 7; release",
        ),
    ],
)
async def test_a_stream_is_refused_with_its_reason(
    central: Central, node: Node, what: str, status: grpc.StatusCode, expected: str, text: str
) -> None:
    call = node.updates.Upload(iter(parts(what, node)), timeout=20)
    code, why, said = await refusal(call)
    assert (code, why) == (status, expected), said
    assert text in said
    with central.rooms.journal.read() as state:
        assert not state.updates
    if what not in ("an empty chunk", "two headers"):  # of these the first piece stays
        assert not list(Path(central.settings.data_dir).rglob("*.part"))


@pytest.mark.parametrize("update_id", ["", "ab", "AB" * 32, "../" * 21 + "a", "g" * 64])
async def test_a_question_about_no_update_is_refused(node: Node, update_id: str) -> None:
    code, why, text = await refusal(node.query(update_id))
    assert (code, why) == (FINAL, "BAD_ARGUMENT")
    assert "Expected 64 lower-case hex digits" in text
