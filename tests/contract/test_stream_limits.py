"""Streams that a node may have open: a faulty site holds no slots or memory for ever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from central.blobs.directory import DirectoryBlobs
from central.errors import Reason, Refused
from central.fleet.streams import OpenStreams
from central.intake import service
from central.intake.admission import Admission
from central.intake.uploads import Upload, Uploads
from protos.fleet.v1 import fleet_pb2
from protos.updates.v1 import updates_pb2
from tests.contract.central_harness import (
    Central,
    Node,
    encode_factors,
    make_settings,
    reason,
    refusal,
    running_central,
)

LIMITS = {"node_uploads": 2, "node_watches": 2, "upload_idle_s": 1.0}
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="sees open files through /proc"
)
close = Upload.close


@pytest.fixture
async def central(tmp_path: Path) -> AsyncIterator[Central]:
    async with running_central(make_settings(tmp_path, limits=LIMITS)) as running:
        yield running


async def test_a_silent_upload_ends_and_goes_on_from_its_last_byte(node: Node) -> None:
    payload = encode_factors()
    call = await node.begin(payload, 1, 500)
    code, why, text = await refusal(call)
    assert (code, why) == (grpc.StatusCode.ABORTED, "SILENT_STREAM")
    assert "of which 500 bytes are here" in text
    assert (await node.query(node.manifest(payload).digest)).committed_bytes == 500
    assert await node.upload(payload, offset=500)


async def test_an_upload_without_a_header_ends_too(node: Node) -> None:
    call = node.updates.Upload(timeout=20)
    assert (await refusal(call))[1] == "SILENT_STREAM"


async def test_a_node_may_have_so_many_uploads_open_and_holds_up_no_other(
    central: Central, node: Node
) -> None:
    other = await central.enroll("b", await central.token())
    payload = encode_factors()
    silent = [await node.begin(encode_factors(seed), seed, 500) for seed in (1, 2)]
    ids = [node.manifest(encode_factors(seed), seed).digest for seed in (1, 2)]
    while not all(
        central.rooms.uploads.path(node.node_id, update_id).exists() for update_id in ids
    ):
        await asyncio.sleep(0.01)
    code, why, text = await refusal(node.upload(payload))
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert "CENTRAL_LIMITS__NODE_UPLOADS" in text
    assert await other.upload(payload)
    for call in silent:
        await refusal(call)
    assert await node.upload(payload)


async def test_silent_uploads_hold_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "THREADS", 1)
    async with running_central(
        make_settings(tmp_path, limits=LIMITS | {"upload_idle_s": 10.0})
    ) as central:
        token = await central.token(uses=2)
        slow, other = await central.enroll("a", token), await central.enroll("b", token)
        silent = [await slow.begin(encode_factors(seed), seed, 500) for seed in (1, 2)]
        await until(lambda: len(held_files(central)) == len(silent))
        payloads = [encode_factors(seed) for seed in (3, 4, 5)]
        for sequence, payload in enumerate(payloads, start=1):
            assert await other.upload(payload, other.manifest(payload, sequence))
        assert not any(call.done() for call in silent)
        for seed, call in enumerate(silent, start=1):  # they go on where they stopped
            await call.write(updates_pb2.UploadRequest(chunk=encode_factors(seed)[500:]))
            await call.done_writing()
            assert (await call).receipt.body


@pytest.fixture
def stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, the blob store is slow."""
    event, put = threading.Event(), DirectoryBlobs.put_file

    def slow(*arguments: Any) -> None:
        event.wait(10)
        put(*arguments)

    monkeypatch.setattr(DirectoryBlobs, "put_file", slow)
    yield event
    event.set()


async def test_a_slow_store_holds_uploads_up_and_refuses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stay: threading.Event
) -> None:
    monkeypatch.setattr(service, "THREADS", 2)
    async with running_central(make_settings(tmp_path, limits={"node_uploads": 20})) as central:
        node = await central.enroll("a", await central.token())
        payloads = [encode_factors(seed) for seed in range(10)]
        uploads = [
            await node.begin(payload, sequence)
            for sequence, payload in enumerate(payloads, start=1)
        ]
        for upload in uploads:
            await upload.done_writing()
        await asyncio.sleep(0.5)
        assert not any(upload.done() for upload in uploads)
        stay.set()
        assert all([(await upload).receipt.body for upload in uploads])


async def test_a_node_may_ask_so_many_questions_at_once(node: Node) -> None:
    asking, committed = threading.Event(), Uploads.committed

    def slow(*arguments: Any) -> int:
        asking.wait(10)
        return committed(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Uploads, "committed", slow)
        first = [asyncio.create_task(node.query("ab" * 32)) for _ in range(2)]
        await asyncio.sleep(0.2)
        code, why, text = await refusal(node.query("ab" * 32))
        assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert "CENTRAL_LIMITS__NODE_UPLOADS" in text
        asking.set()
        assert [answer.committed_bytes for answer in await asyncio.gather(*first)] == [0, 0]
    assert (await node.query("ab" * 32)).committed_bytes == 0


def held_files(central: Central) -> list[str]:
    """Unfinished uploads that this process has open."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(path.readlink()))
    return [link for link in links if link.startswith(str(central.settings.data_dir / "uploads"))]


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nodes whose uploads ended."""
    nodes, one = [], OpenStreams.one

    @contextmanager
    def watched(self: OpenStreams, node_id: str) -> Iterator[None]:
        try:
            with one(self, node_id):
                yield
        finally:
            nodes.append(node_id)

    monkeypatch.setattr(OpenStreams, "one", watched)
    return nodes


@pytest.fixture
def leave(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, a thread that has opened an unfinished upload stays there."""
    event, open_file = threading.Event(), Uploads.open

    def slow(*arguments: Any) -> Upload:
        incoming = open_file(*arguments)
        event.wait(10)
        return incoming

    monkeypatch.setattr(Uploads, "open", slow)
    yield event
    event.set()


@needs_proc
async def test_a_call_that_ends_while_its_file_is_opened_gives_the_file_back(
    central: Central, node: Node, ended: list[str], leave: threading.Event
) -> None:
    call = await node.begin(encode_factors(), 1, 500)
    await until(lambda: held_files(central))
    call.cancel()
    await asyncio.sleep(0.2)
    assert not ended  # it is one of the node's uploads as long as it takes a thread
    leave.set()
    await until(lambda: ended and not held_files(central))


@needs_proc
async def test_a_refused_call_that_ends_while_all_threads_are_busy_gives_its_file_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: list[str], leave: threading.Event
) -> None:
    monkeypatch.setattr(service, "THREADS", 1)
    refusing: list[str] = []
    monkeypatch.setattr(
        Upload, "close", property(lambda self: refusing.append("") or partial(close, self))
    )
    async with running_central(make_settings(tmp_path)) as central:
        node = await central.enroll("a", await central.token())
        payload = encode_factors()
        leave.set()
        call = await node.begin(payload, 1, 500)
        await until(
            lambda: central.rooms.uploads.path(node.node_id, node.manifest(payload).digest).exists()
        )
        leave.clear()
        other = await node.begin(payload, 2, 500)
        await until(lambda: len(held_files(central)) == 2)
        await call.write(updates_pb2.UploadRequest(chunk=b""))
        await until(lambda: refusing)
        call.cancel()
        await until(lambda: ended)
        leave.set()
        await until(lambda: len(held_files(central)) == 1)
        other.cancel()
        await until(lambda: not held_files(central))


@pytest.mark.parametrize("step", ["begin", "_keep"])
async def test_the_error_of_a_call_that_hung_up_is_no_news(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ended: list[str],
    step: str,
) -> None:
    reached, go = threading.Event(), threading.Event()

    def refuse(*_: object) -> None:
        reached.set()
        go.wait(10)
        raise Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_MANIFEST, "Not this one.")

    monkeypatch.setattr(Admission, step, refuse)
    call = await node.begin(encode_factors())
    await call.done_writing()
    await asyncio.to_thread(reached.wait, 10)
    call.cancel()
    await asyncio.sleep(0.2)
    go.set()
    await until(lambda: ended)
    await asyncio.sleep(0.2)
    gc.collect()
    assert "never retrieved" not in caplog.text


async def refused(watch: grpc.aio.UnaryStreamCall) -> str | None:
    """Why the watch was refused, None when it lives."""
    try:
        await watch.read()
    except grpc.aio.AioRpcError as error:
        return reason(error)
    return None


async def test_a_node_may_have_so_many_watches_open(node: Node) -> None:
    watches = [node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20) for _ in range(2)]
    assert [await refused(watch) for watch in watches] == [None, None]
    code, why, text = await refusal(node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20).read())
    assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
    assert "CENTRAL_LIMITS__NODE_WATCHES" in text
    watches[0].cancel()
    async with asyncio.timeout(10):  # until central has noticed
        while await refused(node.fleet.Watch(fleet_pb2.WatchRequest(), timeout=20)):
            await asyncio.sleep(0.01)
