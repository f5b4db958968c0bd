from __future__ import annotations

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from cryptography import x509

from edge_node.problems import Problems
from edge_node.serving.certificate import CertificateWatch
from tests.fakes.certificates import make_certificate


class Endpoint:
    """A TLS server whose certificate is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.problems = folder, Problems(folder)
        self.files = make_certificate(folder)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*self.files)

    async def start(self) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        self._server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=self._context)
        certificate, key = map(str, self.files)
        self._watch = CertificateWatch(
            self._context, key, certificate, problems=self.problems, poll_s=0.01
        )

    async def serial(self) -> int:
        """Of the certificate that a client is shown now."""
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        port = self._server.sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(shown).serial_number

    def said(self) -> list[str]:
        return [problem.text for problem in self.problems.current() if problem.room == "tls"]

    async def stop(self) -> None:
        self._watch.stop()
        self._server.close()


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    started = Endpoint(tmp_path)
    await started.start()
    yield started
    await started.stop()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():
            await asyncio.sleep(0.01)


async def test_each_renewal_is_served(endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert await endpoint.serial() == 1
    for serial in (2, 3):  # vLLM's own watch would miss the second

        async def shown(serial: int = serial) -> bool:
            return await endpoint.serial() == serial

        make_certificate(endpoint.folder, serial)
        await until(shown)
    assert endpoint.said() == []
    await asyncio.sleep(0.3)
    read = [one for one in caplog.messages if "was read again" in one]
    assert 2 <= len(read) <= 4, "a renewal is read once, or once for each of its files"


async def test_a_pair_that_does_not_fit_is_a_problem_until_it_does(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    certificate, key = make_certificate(other, 2)
    shutil.copy(certificate, endpoint.files[0])  # its key is still to come

    async def told() -> bool:
        return endpoint.said() != []

    await until(told)
    assert "The one before is served on" in endpoint.said()[0]
    assert await endpoint.serial() == 1
    shutil.copy(key, endpoint.files[1])

    async def shown() -> bool:
        return await endpoint.serial() == 2 and endpoint.said() == []

    await until(shown)


async def test_a_removed_file_changes_nothing(endpoint: Endpoint) -> None:
    endpoint.files[0].unlink()

    async def told() -> bool:
        return endpoint.said() != []

    await until(told)
    assert await endpoint.serial() == 1
