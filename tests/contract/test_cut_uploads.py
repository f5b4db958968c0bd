"""A cut connection of which central knows nothing: the node goes on from the last byte."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from central.intake.admission import Admission
from central.intake.uploads import Upload
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_settings,
    reason,
    running_central,
)

CAME = 500
"""Bytes of the payload that came before the cut."""


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with running_central(make_settings(tmp_path)) as running:
        yield running


@pytest.fixture
async def node(central: Central) -> Node:
    return await central.enroll("a", await central.token())


class Relay:
    """Passes bytes between a node and central until it is cut; then both sides hear nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._passes = asyncio.Event()
        self._passes.set()
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for writer in self._writers:
                writer.close()

    def cut(self) -> None:
        self._passes.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, other_writer]
        with suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pass(reader, other_writer), self._pass(other_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._passes.wait()
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def cut_upload(
    central: Central, node: Node, payload: bytes
) -> AsyncIterator[grpc.aio.StreamUnaryCall]:
    """An upload that was cut off after `CAME` bytes, and neither side knows it."""
    relay = Relay(central.settings.listen.port)
    pem = node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    async with relay.listening() as port:
        cut = replace(node, channel=central.channel(pem, node.answer.certificate_pem, port))
        call = await cut.begin(payload, 1, CAME)
        part = central.rooms.uploads.path(node.node_id, node.manifest(payload).digest)
        async with asyncio.timeout(10):
            while not part.exists():
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # the piece is here
        relay.cut()
        yield call
        call.cancel()


async def test_a_question_hears_of_every_byte_that_came(central: Central, node: Node) -> None:
    payload = encode_factors()
    async with cut_upload(central, node, payload):
        assert (await node.query(node.manifest(payload).digest)).committed_bytes == CAME
        assert await node.upload(payload, offset=CAME)  # the first try, and no byte twice


async def test_a_newer_upload_goes_on_without_a_question(central: Central, node: Node) -> None:
    payload = encode_factors()
    async with cut_upload(central, node, payload):
        assert await node.upload(payload, offset=CAME)


async def test_an_upload_from_the_start_is_told_how_much_came(central: Central, node: Node) -> None:
    payload = encode_factors()
    async with cut_upload(central, node, payload):
        with pytest.raises(grpc.aio.AioRpcError, match=f"central has {CAME}") as caught:
            await node.upload(payload)
        assert reason(caught.value) == "WRONG_OFFSET"
        assert (await node.query(node.manifest(payload).digest)).committed_bytes == CAME


async def test_questions_and_uploads_at_once_all_get_on(central: Central, node: Node) -> None:
    payload = encode_factors()
    update_id = node.manifest(payload).digest
    async with cut_upload(central, node, payload):
        asked = await asyncio.gather(*(node.query(update_id) for _ in range(3)))
        assert [answer.committed_bytes for answer in asked] == [CAME] * 3
        silent = await node.begin(encode_factors(2), 2, 100)  # another update's stream stays
        assert await node.upload(payload, offset=CAME)
        assert not silent.done()
        silent.cancel()


async def test_the_older_stream_is_told_why(node: Node) -> None:
    payload = encode_factors()
    older = await node.begin(payload, 1, CAME)
    await asyncio.sleep(0.3)
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == CAME
    with pytest.raises(
        grpc.aio.AioRpcError, match=f"of which {CAME} bytes are here; central closed"
    ) as caught:
        await older
    assert (caught.value.code(), reason(caught.value)) == (grpc.StatusCode.ABORTED, "TAKEN_OVER")


async def test_a_question_waits_for_an_upload_that_is_being_admitted(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = threading.Event(), threading.Event()
    keep = Admission._keep

    def slow(*arguments: Any) -> None:
        reached.set()
        go.wait(10)
        keep(*arguments)

    monkeypatch.setattr(Admission, "_keep", slow)
    payload = encode_factors()
    upload = asyncio.create_task(node.upload(payload))
    await asyncio.to_thread(reached.wait, 10)
    question = asyncio.create_task(node.query(node.manifest(payload).digest))
    await asyncio.sleep(0.2)
    assert not question.done()
    go.set()
    assert (await question).receipt == await upload


async def test_a_question_is_answered_while_a_silent_upload_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closing, close = asyncio.Event(), Upload.close
    loop = asyncio.get_running_loop()

    def slow(upload: Upload) -> None:
        loop.call_soon_threadsafe(closing.set)
        time.sleep(0.5)  # the disk is busy
        close(upload)

    monkeypatch.setattr(Upload, "close", slow)
    settings = make_settings(tmp_path, limits={"upload_idle_s": 1.0})
    async with running_central(settings) as central:
        node = await central.enroll("a", await central.token())
        payload = encode_factors()
        silent = await node.begin(payload, 1, CAME)
        await asyncio.wait_for(closing.wait(), 10)
        assert (await node.query(node.manifest(payload).digest)).committed_bytes == CAME
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent
        assert reason(caught.value) == "SILENT_STREAM"
