"""gRPC's own words say why central is away; no proxy leads to the own host."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from central.errors import CentralUnreachable
from central.operators.client import OperatorClient
from central.settings import CentralSettings
from edge_node.identity import open_channel
from protos.operators.v1 import operators_pb2
from tests.contract.central_harness import make_settings, running_central

DAY = timedelta(days=1)
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def list_nodes(settings: CentralSettings, timeout_s: float = 10) -> operators_pb2.ListNodesResponse:
    with OperatorClient.connect(settings) as client:
        return client.ask(client.stub.ListNodes, operators_pb2.ListNodesRequest(), timeout_s)


async def why(settings: CentralSettings, timeout_s: float = 10) -> str:
    with pytest.raises(CentralUnreachable) as caught:
        await asyncio.to_thread(list_nodes, settings, timeout_s)
    return str(caught.value)


async def test_the_operators_commands_need_no_proxy(tmp_path: Path, dead_proxy: None) -> None:
    settings = make_settings(tmp_path)
    async with running_central(settings):
        assert list((await asyncio.to_thread(list_nodes, settings)).nodes) == []


async def test_a_central_that_does_not_run_is_to_be_started(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    async with running_central(settings):
        pass
    text = await why(settings)
    assert "Connection refused" in text
    assert "`central serve`" in text


async def test_another_ca_is_no_central_to_be_started(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    async with running_central(make_settings(tmp_path / "other")) as other:
        ours = settings.model_copy(update={"listen": other.settings.listen})
        certificates(ours.data_dir / "pki", starts=-DAY)
        text = await why(ours)
    assert "certificate" in text.lower()
    assert "CENTRAL_DATA_DIR" in text
    assert "`central serve`" not in text


async def test_a_certificate_of_tomorrow_names_the_clock(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    async with tls_server(settings, starts=DAY):
        text = await why(settings)
    assert "not yet valid" in text
    assert "clock" in text


async def test_a_central_that_does_not_answer_has_a_log(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    certificates(settings.data_dir / "pki", starts=-DAY)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", settings.listen.port))
        silent.listen()
        text = await why(settings, 0.5)
    assert "Deadline" in text
    assert "central's log" in text


def own_address() -> str:
    """An address of this machine in its network, or the loopback's where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


@pytest.mark.parametrize(
    "host",
    ["localhost", "127.0.0.1", "127.9.9.9", "[::1]", socket.gethostname().upper(), own_address()],
)
async def test_a_node_needs_no_proxy_to_its_own_host(host: str, dead_proxy: None) -> None:
    text = await failure(f"{host}:1")
    assert "127.0.0.1:9" not in text


async def test_a_node_uses_the_data_centres_proxy_to_another_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    for name in PROXIES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert "407" in await failure("central.example:9443")
    assert asked[0].startswith(b"CONNECT central.example:9443")
    server.close()


async def failure(address: str) -> str:
    async with open_channel(address, grpc.ssl_channel_credentials()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/x/Y")(b"", timeout=10)
    return str(caught.value.details())


@asynccontextmanager
async def tls_server(settings: CentralSettings, starts: timedelta) -> AsyncIterator[None]:
    ca, key, certificate = certificates(settings.data_dir / "pki", starts)
    server = grpc.aio.server()
    credentials = grpc.ssl_server_credentials([(key, certificate)], ca)
    server.add_secure_port(f"127.0.0.1:{settings.listen.port}", credentials)
    await server.start()
    yield
    await server.stop(None)


def certificates(folder: Path, starts: timedelta) -> tuple[bytes, bytes, bytes]:
    """Writes a CA with an operator's key; PEM of the CA, a key, a certificate from `starts`."""
    folder.mkdir(parents=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    now = datetime.now(UTC)

    def certificate(subject: x509.Name, starts: timedelta, ca: bool) -> bytes:
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
        )
        builder = x509.CertificateBuilder(
            name, subject, key.public_key(), x509.random_serial_number()
        )
        builder = builder.not_valid_before(now + starts).not_valid_after(now + starts + 9 * DAY)
        builder = builder.add_extension(names, critical=False)
        builder = builder.add_extension(
            x509.BasicConstraints(ca=ca, path_length=None), critical=True
        )
        return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)

    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    other = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "central")])
    files = {"ca.pem": certificate(name, -DAY, True), "operator.key": private}
    files["operator.pem"] = certificate(other, -DAY, False)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return files["ca.pem"], private, certificate(other, starts, False)
