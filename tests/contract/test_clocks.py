"""Clocks that are wrong: the message names the clock, and not the address."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from central.errors import CentralUnreachable as OperatorUnreachable
from central.fleet import pki
from central.fleet.tokens import create_token
from central.operators.client import OperatorClient
from edge_node.errors import CentralUnreachable, SettingsError
from edge_node.identity import clock_advice, request_enrollment
from edge_node.settings import EdgeSettings
from edge_node.surroundings import expect_same_time
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract.central_harness import Central, Node, make_settings, running_central

DAY = timedelta(days=1)


@pytest.fixture
def central_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Central's clock was two months ahead when it made its server's certificate."""
    monkeypatch.setattr(pki, "_expect_valid", lambda *_: None)
    monkeypatch.setattr(pki, "BACKDATE", -60 * DAY)


async def test_enrolment_names_the_clock_and_not_the_address(
    tmp_path: Path, central_ahead: None
) -> None:
    async with running_central(make_settings(tmp_path)) as central:
        rooms, port = central.rooms, central.settings.listen.enrollment_port
        rooms.registry.ensure_cohort("shared")
        token, _ = create_token(rooms.journal, rooms.pki.ca_pem, "shared", 1, 600, "tests")
        settings = EdgeSettings.model_validate(
            {
                "data_dir": tmp_path / "edge",
                "base": {"path": central.settings.base.path},
                "central": {"join_token": token, "enrollment_address": f"localhost:{port}"},
            }
        )
        with pytest.raises(
            CentralUnreachable,
            match="Central's certificate is not valid now, and this node's clock",
        ) as e:
            await request_enrollment(settings, rooms.base.digest)
        assert "EDGE_CENTRAL__ENROLLMENT_ADDRESS" not in str(e.value)


async def test_the_operators_command_names_the_clock(tmp_path: Path, central_ahead: None) -> None:
    async with running_central(make_settings(tmp_path)) as central:

        def ask() -> None:
            with OperatorClient.connect(central.settings) as client:
                client.ask(client.stub.ListNodes, operators_pb2.ListNodesRequest())

        with pytest.raises(
            OperatorUnreachable,
            match="Central's certificate is not valid now, and this machine's clock",
        ):
            await asyncio.to_thread(ask)


async def test_a_node_whose_certificate_central_does_not_take_hears_of_the_clock(
    central: Central, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pki, "BACKDATE", -DAY)
    certificate = central.rooms.pki.issue_node_certificate(
        node.node_id, "shared", node.key.public_key()
    )
    pem = node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    channel = central.channel(pem, certificate)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/lorikeet.releases.v1.ReleaseService/GetHead")(b"", timeout=10)
    details = caught.value.details() or ""
    now = datetime.now(UTC)
    text = clock_advice(details, certificate, now) or ""
    assert f"valid from {now + DAY:%Y-%m-%d}" in text
    assert f"this node's clock says {now:%Y-%m-%d %H:%M} UTC" in text
    # By the node's own clock all is well, so it is central's.
    assert "if central's clock says a time outside of that" in (
        clock_advice(details, certificate, now + 2 * DAY) or ""
    )
    assert clock_advice("Connection refused", node.answer.certificate_pem, now) is None


async def test_central_says_what_time_it_is(node: Node) -> None:
    answer = await node.releases.GetHead(releases_pb2.GetHeadRequest(channel="stable"), timeout=20)
    now = datetime.now(UTC).timestamp()
    assert abs(answer.unix_time_s - now) < 10
    expect_same_time(answer.unix_time_s, now)
    with pytest.raises(
        SettingsError,
        match=r"This node's clock says .* central's says .* Set the clock that is wrong",
    ):
        expect_same_time(answer.unix_time_s, now + 86_400)
