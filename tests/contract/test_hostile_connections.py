"""Clients that hold connections or flood them: nodes are served, and memory stays bounded."""

from __future__ import annotations

import asyncio
import itertools
import resource
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from central.settings import CentralSettings
from edge_node.identity import JoinToken
from tests.contract import central_process as processes
from tests.contract import hostile_http2 as hostile
from tests.contract.central_harness import Central, Node, make_settings, running_central

LIMITS = {"connections": 6, "enrollment_connections": 4, "handshake_s": 1.0}
NOTHING = "ab" * 32
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="reads memory from /proc"
)


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with running_central(make_settings(tmp_path, limits=LIMITS)) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    known = await central.enroll("a", await central.token())
    await known.query(NOTHING)
    return known


async def test_idle_clients_take_no_more_than_their_port_has(central: Central, node: Node) -> None:
    token = await central.token()
    anybody = hostile.context(central.rooms.pki.ca_pem)
    with ExitStack() as held:
        opened = await asyncio.to_thread(_hold, held, lambda: _enrollment(central, anybody), 20)
        assert 0 < opened <= 4
        await node.query(NOTHING)  # who is there already is served
        async with asyncio.timeout(20):  # they are closed, though they never go by themselves
            while not await _can_enroll(central, token):
                await asyncio.sleep(0.2)
        await node.query(NOTHING)


async def test_clients_that_never_greet_are_closed(central: Central, node: Node) -> None:
    newcomer = await central.enroll("b", await central.token())  # and connects only later
    with ExitStack() as held:
        port = central.settings.listen.port
        await asyncio.to_thread(
            _hold, held, lambda: socket.create_connection(("127.0.0.1", port), 5), 20
        )
        await node.query(NOTHING)
        async with asyncio.timeout(20):
            while not await _is_served(newcomer):
                await asyncio.sleep(0.2)


@pytest.mark.parametrize(("port", "streams"), [("nodes", 64), ("enrolment", 4)])
async def test_a_connection_has_so_many_calls_at_once(
    central: Central, node: Node, tmp_path: Path, port: str, streams: int
) -> None:
    def read_settings() -> dict[int, int]:
        with _connect(central, node, tmp_path, port) as connection:
            head = _read(connection, 9)
            assert head[3] == hostile.SETTINGS
            return dict(
                struct.iter_unpack(">HI", _read(connection, int.from_bytes(head[:3], "big")))
            )

    max_concurrent_streams = 3
    assert (await asyncio.to_thread(read_settings))[max_concurrent_streams] == streams


@pytest.mark.slow
async def test_a_connection_to_the_enrolment_port_ends(central: Central) -> None:
    """However slowly a call comes."""

    def trickle() -> bool:
        with _enrollment(central, hostile.context(central.rooms.pki.ca_pem)) as connection:
            connection.sendall(hostile.frame(hostile.HEADERS, 0, 1, hostile.request_headers("/x")))
            return hostile.hung_up(connection, 30)

    assert await asyncio.to_thread(trickle)


def _headers() -> Iterator[bytes]:
    yield hostile.frame(hostile.HEADERS, 0, 1, hostile.request_headers("/x"))
    piece = hostile.frame(hostile.CONTINUATION, 0, 1, hostile.literal("a", b"b" * 100) * 100)
    yield from itertools.repeat(piece)


def _big_calls() -> Iterator[bytes]:
    block = hostile.request_headers(
        "/lorikeet.fleet.v1.EnrollmentService/Enroll", ("x", b"v" * 7000)
    )
    yield from (
        hostile.frame(hostile.HEADERS, hostile.END_HEADERS, stream, block)
        for stream in range(1, 1 << 31, 2)
    )


def _pings() -> Iterator[bytes]:
    yield from (
        hostile.frame(hostile.PING, payload=struct.pack(">Q", number))
        for number in itertools.count()
    )


def _settings() -> Iterator[bytes]:
    yield from itertools.repeat(hostile.frame(hostile.SETTINGS))


def _calls_and_resets() -> Iterator[bytes]:
    block = hostile.request_headers("/lorikeet.updates.v1.UpdateService/Upload")
    for stream in range(1, 1 << 31, 2):
        yield hostile.frame(hostile.HEADERS, hostile.END_HEADERS, stream, block)
        yield hostile.frame(hostile.RST_STREAM, 0, stream, struct.pack(">I", 8))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("port", ["nodes", "enrolment"])
@pytest.mark.parametrize("frames", [_headers, _big_calls, _calls_and_resets, _pings, _settings])
async def test_a_flood_takes_little_memory(
    tmp_path: Path, port: str, frames: Callable[[], Iterator[bytes]]
) -> None:
    """Two connections for 8 s. Before there were limits: 1.4 GB for headers, 0.7 GB for calls."""
    async with _process(make_settings(tmp_path)) as (running, central):
        known = await central.enroll("a", await central.token())
        await known.query(NOTHING)
        before = _resident_bytes(running.pid)

        def flood() -> None:
            with _connect(central, known, tmp_path, port) as connection:
                hostile.flood(connection, frames(), 8, 8 << 30, reads=frames in (_pings, _settings))

        threads = [threading.Thread(target=flood) for _ in range(2)]
        for thread in threads:
            thread.start()
        peak = before
        while any(thread.is_alive() for thread in threads):
            peak = max(peak, _resident_bytes(running.pid))
            await asyncio.sleep(0.1)
        await known.query(NOTHING)
        assert (peak - before) >> 20 < 350


@pytest.mark.slow
async def test_1250_idle_clients_do_not_block_a_central_with_1024_open_files(
    tmp_path: Path,
) -> None:
    settings = make_settings(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with _process(settings, files=1024) as (_, central):
        token = await central.token(uses=10)
        known = await central.enroll("a", token)
        await known.query(NOTHING)
        anybody = hostile.context(central.rooms.pki.ca_pem)
        with ExitStack() as held:
            for make in (
                lambda: _enrollment(central, anybody),
                lambda: socket.create_connection(("127.0.0.1", settings.listen.port), 5),
            ):
                await asyncio.to_thread(_hold, held, make, 1250)
            await known.query(NOTHING)
            async with asyncio.timeout(60):
                while not await _can_enroll(central, token):
                    await asyncio.sleep(0.5)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


@asynccontextmanager
async def _process(
    settings: CentralSettings, files: int = 0
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Central]]:
    """Central as a process of its own, if wished with so many open files at most."""
    async with processes.process(settings, "serve", files=files) as running:
        await processes.ready(running)
        async with processes.outside(settings) as central:
            yield running, central


def _hold(held: ExitStack, make: Callable[[], socket.socket], number: int) -> int:
    """Open so many and leave them silent; returns how many were taken, and still are."""
    made = []
    patience = 5
    while number and patience:
        number -= 1
        try:
            made.append(held.enter_context(make()))
        except TimeoutError:  # nobody answers any more
            patience -= 1
        except OSError:
            pass
    alive = 0
    for connection in made:
        connection.settimeout(0.01)
        try:
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            alive += 1
        except OSError:
            pass
    return alive


async def _can_enroll(central: Central, token: JoinToken) -> bool:
    with suppress(grpc.aio.AioRpcError):
        await central.enroll("b", token)
        return True
    return False


async def _is_served(node: Node) -> bool:
    with suppress(grpc.aio.AioRpcError):
        await node.query(NOTHING)
        return True
    return False


def _enrollment(central: Central, anybody: hostile.ssl.SSLContext) -> hostile.ssl.SSLSocket:
    return hostile.connect(central.settings.listen.enrollment_port, anybody)


def _connect(central: Central, node: Node, folder: Path, port: str) -> hostile.ssl.SSLSocket:
    if port == "enrolment":
        return _enrollment(central, hostile.context(central.rooms.pki.ca_pem))
    key, certificate = folder / "node.key", folder / "node.pem"
    key.write_bytes(node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    certificate.write_bytes(node.answer.certificate_pem)
    tls = hostile.context(central.rooms.pki.ca_pem, str(key), str(certificate))
    return hostile.connect(central.settings.listen.port, tls)


def _read(connection: hostile.ssl.SSLSocket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data))
    return data


def _resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10
