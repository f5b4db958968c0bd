"""A node's release store, and a real grpc.aio server for its central."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.identity import Identity
from edge_node.releases.store import ReleaseStore
from protos.base import BaseModelInfo
from protos.fleet.v1 import fleet_pb2_grpc
from protos.releases.v1 import releases_pb2_grpc
from tests.contract.release_watcher.stand_ins import Central, Connect
from tests.fakes.signed_releases import BASE, SHAPES


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def store(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> ReleaseStore:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return ReleaseStore(
        tmp_path,
        Identity("n-1", "shared", BASE, key, b"", b"", public),
        BaseModelInfo(tmp_path, BASE, SHAPES),
    )


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    opened: list[grpc.aio.Server | grpc.aio.Channel] = []

    async def start(central: Central) -> grpc.aio.Channel:
        server = grpc.aio.server()
        releases_pb2_grpc.add_ReleaseServiceServicer_to_server(central, server)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(central, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        opened.extend([server, channel])
        return channel

    yield start
    for item in reversed(opened):
        await (item.close() if isinstance(item, grpc.aio.Channel) else item.stop(0))
