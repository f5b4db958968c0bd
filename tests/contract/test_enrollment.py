"""Enrolment with mutual TLS on real servers: who gets a certificate, and what it opens."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from central import server
from central.fleet import identity, pki
from central.fleet.identity import Authenticator
from protos.fleet.v1 import fleet_pb2
from protos.lora import decode
from protos.manifest import sha256_hex, verify
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from protos.updates.v1 import updates_pb2
from tests.contract import central_harness as harness
from tests.contract.central_harness import Central, Node, refusal


async def test_enrolment_gives_an_identity_and_the_first_release(
    central: Central, node: Node
) -> None:
    assert node.node_id.startswith("a-")
    assert node.answer.cohort == "shared"
    verify(node.answer.release_key_pem, node.answer.genesis.manifest, node.answer.genesis.signature)
    assert sha256_hex(node.answer.genesis_payload) == node.genesis.payload.digest_sha256
    assert decode(node.answer.genesis_payload).modules == {}
    assert (node.genesis.version, node.genesis.base) == (0, central.rooms.base.digest)


async def test_a_retried_enrolment_gets_the_same_node_even_when_the_token_is_used_up(
    central: Central,
) -> None:
    token = await central.token(uses=1)
    key = ec.generate_private_key(ec.SECP256R1())
    first = await central.enroll("a", token, key)
    again = await central.enroll("a", token, key)
    assert again.node_id == first.node_id
    await again.query("0" * 64)
    code, why, text = await refusal(central.enroll("b", token))
    assert (code, why) == (grpc.StatusCode.PERMISSION_DENIED, "BAD_TOKEN")
    assert "used 1 of 1 times" in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"token_secret": "wrong"}, "BAD_TOKEN"),
        ({"token_id": ""}, "BAD_TOKEN"),
        ({"base_digest": "0" * 64}, "OTHER_BASE"),
        ({"node_name": "../x"}, "BAD_ARGUMENT"),
        ({"node_name": "x\n"}, "BAD_ARGUMENT"),
        ({"csr_pem": b"no"}, "BAD_ARGUMENT"),
        ({}, "NAME_TAKEN"),
    ],
)
async def test_enrolment_refuses(
    central: Central, node: Node, changed: dict[str, Any], expected: str
) -> None:
    token = await central.token()
    _, why, _ = await refusal(central.enroll("a", token, **changed))
    assert why == expected
    with central.rooms.journal.read() as state:
        assert list(state.nodes) == [node.node_id]


async def test_without_a_certificate_nothing_is_answered(central: Central) -> None:
    stub = harness.updates_pb2_grpc.UpdateServiceStub(central.channel())
    code, _, _ = await refusal(
        stub.QueryUpload(updates_pb2.QueryUploadRequest(update_id="0" * 64), timeout=20)
    )
    assert code is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("case", "code", "expected"),
    [
        ("foreign", grpc.StatusCode.UNAVAILABLE, None),  # refused by TLS
        ("expired", grpc.StatusCode.UNAVAILABLE, None),
        ("other key", grpc.StatusCode.UNAUTHENTICATED, "UNKNOWN_NODE"),
        ("other cohort", grpc.StatusCode.PERMISSION_DENIED, "COHORT_MISMATCH"),
        ("server", grpc.StatusCode.UNAVAILABLE, None),  # not made for clients
    ],
)
async def test_a_certificate_that_is_not_the_nodes_own_is_refused(
    central: Central,
    node: Node,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    code: grpc.StatusCode,
    expected: str | None,
) -> None:
    rooms = central.rooms
    key = ec.generate_private_key(ec.SECP256R1()) if case == "other key" else node.key
    issuer = pki.Pki.load_or_create(tmp_path / "foreign", []) if case == "foreign" else rooms.pki
    if case == "expired":
        monkeypatch.setattr(pki, "CERTIFICATE_LIFE", -timedelta(minutes=5))
    cohort = "zeta" if case == "other cohort" else "shared"
    certificate = issuer.issue_node_certificate(node.node_id, cohort, key.public_key())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    if case == "server":
        pem, certificate = rooms.pki.server_key_pem, rooms.pki.server_certificate_pem
    stub = harness.updates_pb2_grpc.UpdateServiceStub(central.channel(pem, certificate))
    query = stub.QueryUpload(updates_pb2.QueryUploadRequest(update_id="0" * 64), timeout=20)
    assert (await refusal(query))[:2] == (code, expected)


async def test_a_node_is_no_operator(node: Node) -> None:
    stub = harness.operators_pb2_grpc.OperatorServiceStub(node.channel)
    code, why, _ = await refusal(stub.ListNodes(operators_pb2.ListNodesRequest(), timeout=20))
    assert (code, why) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_OPERATOR")


@pytest.fixture
async def clocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Central, list[datetime]]]:
    """A central whose authenticator reads the clock that the test sets."""
    now = [datetime.now(UTC)]
    monkeypatch.setattr(
        server, "Authenticator", lambda journal: Authenticator(journal, lambda: now[0])
    )
    async with harness.running_central(
        harness.make_settings(tmp_path), heartbeat_s=0.05
    ) as running:
        yield running, now


def hold_up(central: Central, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A download gets its first chunk, and the next ones when the event is set."""
    going_on, read = threading.Event(), central.rooms.blobs.read_range

    def slow(digest: str, start: int, end: int) -> bytes:
        assert start == 0 or going_on.wait(20)
        return read(digest, start, end)

    monkeypatch.setattr(central.rooms.blobs, "read_range", slow)
    return going_on


async def test_an_open_connection_ends_with_its_certificate(
    clocked: tuple[Central, list[datetime]], monkeypatch: pytest.MonkeyPatch
) -> None:
    central, now = clocked
    node = await central.enroll("a", await central.token())
    payload = harness.encode_factors()
    release, _ = await harness.make_candidate(central, node, harness.encode_factors(5), large=True)
    operator = central.operators
    await operator.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    watch = node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)
    await watch.read()
    upload = await node.begin(payload, 2, stop=300)
    going_on = hold_up(central, monkeypatch)
    download = node.releases.Download(releases_pb2.DownloadRequest(release_id=release), timeout=20)
    await download.read()
    now[0] += pki.CERTIFICATE_LIFE + timedelta(minutes=1)
    going_on.set()

    async def all_of(call: Any) -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    async def goes_on() -> None:
        await harness.write(upload, updates_pb2.UploadRequest(chunk=payload[300:]))
        await upload.done_writing()
        await upload

    expired = (grpc.StatusCode.UNAUTHENTICATED, "CERTIFICATE_EXPIRED")
    # First what fills the connection's window: a heartbeat would wait behind it.
    assert (await refusal(all_of(download)))[:2] == expired
    assert (await refusal(all_of(watch)))[:2] == expired
    assert (await refusal(goes_on()))[:2] == expired
    assert (await refusal(node.query("0" * 64)))[:2] == expired
    assert (await refusal(node.upload(payload)))[:2] == expired
    code, why, text = await refusal(
        operator.ListNodes(operators_pb2.ListNodesRequest(), timeout=20)
    )
    assert (code, why, "operator's certificate is made anew" in text) == (*expired, True)


async def test_a_revocation_ends_streams_that_are_open(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "ASK_S", 0.0)
    payload = harness.encode_factors()
    release, _ = await harness.make_candidate(central, node, harness.encode_factors(5), large=True)
    upload = await node.begin(payload, 2, stop=300)
    going_on = hold_up(central, monkeypatch)
    download = node.releases.Download(releases_pb2.DownloadRequest(release_id=release), timeout=20)
    await download.read()
    await central.operators.RevokeNode(
        operators_pb2.RevokeNodeRequest(node_id=node.node_id), timeout=20
    )
    going_on.set()

    async def goes_on() -> None:
        # It is not complete, and yet refused.
        await harness.write(upload, updates_pb2.UploadRequest(chunk=payload[300:301]))
        await upload

    async def rest() -> None:
        while await download.read() is not grpc.aio.EOF:
            pass

    assert (await refusal(goes_on()))[1] == "REVOKED_NODE"
    assert (await refusal(rest()))[1] == "REVOKED_NODE"
