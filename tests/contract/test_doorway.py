"""The port passes from the node to a server like vLLM's and back, under load: nobody is dropped."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from edge_node.serving.command import LISTEN_VARIABLE
from edge_node.serving.doorway import Doorway
from edge_node.serving_settings import ServingSettings, TlsSettings
from examples.ports import free_port
from tests.fakes.certificates import make_certificate

SERVER = """
import asyncio, os, signal, socket
from types import SimpleNamespace
import uvicorn, uvloop
from edge_node.serving.internals import Engine

draining = False

async def app(scope, receive, send):
    await asyncio.sleep(0.03)
    headers = [(b"content-length", b"2"), (b"x-who", b"vllm")]
    headers += [(b"connection", b"close")] if draining else []
    status = 503 if draining else 200
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})

async def main():
    inherited = socket.socket(fileno=int(os.environ["LORIKEET_LISTEN_FD"]))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_keep_alive=75)
    server = uvicorn.Server(config)
    engine = Engine.__new__(Engine)
    engine._state = SimpleNamespace(server=server)
    engine.stop_listening()  # before it listens: nothing
    serving = asyncio.create_task(server.serve(sockets=[inherited]))

    def drain():
        global draining
        draining = True
        engine.stop_listening()

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, drain)
    # As vLLM 0.32 ends its server: what it has is dropped.
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, serving.cancel)
    await asyncio.gather(serving, return_exceptions=True)

uvloop.run(main())
"""


class Clients:
    """They ask on and on; `seen` counts by phase, status and who answered."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/"
        self.phase = "start"
        self.seen: Counter[tuple[str, int, str]] = Counter()
        self.broken: list[tuple[str, str]] = []
        self._stop = asyncio.Event()

    async def __aenter__(self) -> Clients:
        self._http = httpx.AsyncClient()
        self._tasks = [asyncio.create_task(self._ask()) for _ in range(8)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._http.aclose()

    async def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                answer = await self._http.get(self._url)
            except httpx.HTTPError as error:
                self.broken.append((self.phase, repr(error)))
                continue
            who = answer.headers.get("x-who", "node")
            self.seen[self.phase, answer.status_code, who] += 1
            await asyncio.sleep(0.005)

    async def until(self, who: str) -> None:
        """Returns when `who` has answered 20 times in this phase."""
        async with asyncio.timeout(30):
            while sum(n for key, n in self.seen.items() if key[::2] == (self.phase, who)) < 20:
                await asyncio.sleep(0.01)


async def test_nobody_is_dropped_when_the_port_changes_hands(tmp_path: Path) -> None:
    port = free_port()
    doorway = Doorway(ServingSettings(port=port))
    doorway.open()
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    async with Clients(port) as clients:
        for _ in range(2):
            clients.phase = "without"
            await doorway.answer()
            await clients.until("node")
            server = await asyncio.create_subprocess_exec(
                sys.executable, str(script), pass_fds=(doorway.fd,),
                env={**os.environ, LISTEN_VARIABLE: str(doorway.fd)},
            )  # fmt: skip
            clients.phase = "both"
            await clients.until("vllm")
            await doorway.leave()
            clients.phase = "served"
            await asyncio.sleep(0.2)  # answers that the node began before
            clients.seen.clear()
            await clients.until("vllm")
            assert {status for _, status, _ in clients.seen} == {200}
            await doorway.answer()
            server.send_signal(signal.SIGUSR1)
            await asyncio.sleep(0.3)
            clients.phase = "draining"
            await clients.until("node")
            assert {key[1:] for key in clients.seen if key[0] == "draining"} <= {
                (503, "node"),
                (503, "vllm"),
            }
            server.send_signal(signal.SIGUSR2)
            await server.wait()
    assert clients.broken == []
    await doorway.aclose()


SLOW = {
    "a request that never ends": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhal",
    "headers that never end": b"POST / HTTP/1.1\r\nho",
    "a client that says nothing": b"",
    "no HTTP": b"\x00\xff\x00",
}


@pytest.mark.parametrize("tls", [False, True])
async def test_no_client_keeps_the_port_from_the_next_vllm(tmp_path: Path, tls: bool) -> None:
    """A node whose `leave` waits for a client would never point at a release again."""
    doorway, port = _doorway(tmp_path, tls=tls)
    doorway.open()
    await doorway.answer()
    trusting = ssl._create_unverified_context() if tls else None
    clients = []
    for said in SLOW.values():
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(said)
        clients.append((reader, writer))
    if tls:  # one that never begins its handshake
        clients.append(await asyncio.open_connection("127.0.0.1", port))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(8):
        await doorway.leave()
    for _, writer in clients:
        writer.close()
    await doorway.aclose()


async def test_a_certificate_that_cannot_be_read_does_not_end_the_node(tmp_path: Path) -> None:
    """It is renewed while vLLM is down, or half of it is there: the one before is served on."""
    doorway, port = _doorway(tmp_path, tls=True)
    doorway.open()
    await doorway.answer()
    assert (await _ask(port)).status_code == 503
    for key in (b"garbage", b""):
        await doorway.leave()
        (tmp_path / "tls.key").write_bytes(key)
        await doorway.answer()
        assert (await _ask(port)).status_code == 503
    await doorway.leave()
    (tmp_path / "tls.pem").unlink()
    await doorway.answer()
    assert (await _ask(port)).status_code == 503
    await doorway.aclose()


async def test_a_renewed_certificate_is_served_in_the_doorway(tmp_path: Path) -> None:
    doorway, port = _doorway(tmp_path, tls=True)
    doorway.open()
    await doorway.answer()
    before = await _certificate(port)
    await doorway.leave()
    make_certificate(tmp_path)
    await doorway.answer()
    assert await _certificate(port) != before
    await doorway.aclose()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_anthropics_clients_get_their_form_from_the_doorway(
    tmp_path: Path, path: str
) -> None:
    doorway, port = _doorway(tmp_path, tls=False)
    doorway.open()
    await doorway.answer()
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"http://127.0.0.1:{port}{path}",
            json={"model": "lorikeet"},
            headers={"x-request-id": "mine"},
        )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "overloaded_error"
    await doorway.aclose()


def _doorway(folder: Path, *, tls: bool) -> tuple[Doorway, int]:
    port = free_port()
    if not tls:
        return Doorway(ServingSettings(port=port)), port
    certificate, key = make_certificate(folder)
    files = TlsSettings(cert_file=certificate, key_file=key)
    return Doorway(ServingSettings(port=port, tls=files)), port


async def _ask(port: int) -> httpx.Response:
    async with httpx.AsyncClient(verify=False) as client:
        return await client.get(f"https://127.0.0.1:{port}/v1/models")


async def _certificate(port: int) -> str:
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
