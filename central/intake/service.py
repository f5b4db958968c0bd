"""UpdateService: resumable uploads of updates.

In: streams of enrolled nodes. Out: signed receipts. Guarantees: an update is acknowledged only when it is on disk and
in the journal; a cut upload goes on at the byte that QueryUpload names; a node sees only its own updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

import grpc

from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Peer, Permission
from central.fleet.streams import OpenStreams
from central.intake import turns
from central.intake.admission import Admission, Arrival
from central.intake.partial import PartialUploads
from central.intake.streams import OpenUploads, Stream, taken_over
from central.intake.turns import Turn
from central.journal import UpdateRecord
from central.journal.records import UpdateStateName
from central.settings import LimitSettings
from protos.manifest import sha256_hex
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
"""They wait for the disk most of the time; with many more they would wait for Python's lock."""
MAX_CHUNK_BYTES = 1 << 20
"""What updates.proto allows; nodes send smaller ones."""
Requests = AsyncIterator[updates_pb2.UploadRequest]
Context = grpc.aio.ServicerContext[Any, Any]
_STATES: dict[UpdateStateName, updates_pb2.UpdateState] = {
    "waiting": updates_pb2.UPDATE_STATE_WAITING,
    "planned": updates_pb2.UPDATE_STATE_PLANNED,
    "merged": updates_pb2.UPDATE_STATE_MERGED,
    "superseded": updates_pb2.UPDATE_STATE_SUPERSEDED,
    "set_aside": updates_pb2.UPDATE_STATE_SET_ASIDE,
    "quarantined": updates_pb2.UPDATE_STATE_QUARANTINED,
    "forgotten": updates_pb2.UPDATE_STATE_FORGOTTEN,
}


class UpdateService(updates_pb2_grpc.UpdateServiceServicer):
    """Served on the mutual-TLS port."""

    def __init__(
        self, admission: Admission, unfinished: PartialUploads, authenticator: Authenticator, limits: LimitSettings
    ) -> None:
        self._admission = admission
        self._partial = unfinished
        self._authenticator = authenticator
        self._idle_s = limits.upload_idle_s
        self._streams = OpenUploads(limits.upload_idle_s)
        self._uploads = OpenStreams("uploads", limits.node_uploads, "CENTRAL_LIMITS__NODE_UPLOADS")
        self._queries = OpenStreams("queries about uploads", limits.node_uploads, "CENTRAL_LIMITS__NODE_UPLOADS")
        self._threads = ThreadPoolExecutor(THREADS, "intake")
        self._turns = asyncio.Semaphore(turns.COUNT)

    async def _blocking(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **named))

    async def QueryUpload(
        self, request: updates_pb2.QueryUploadRequest, context: Context
    ) -> updates_pb2.QueryUploadResponse:
        node = await self._authenticator.node(context)
        update_id = _expect_update_id(request.update_id)
        with self._queries.one(node.node_id):
            await self._streams.take_over(node.node_id, update_id)
            update = await self._blocking(self._admission.find, node.node_id, update_id)
            if update is None or update.lost:  # its bytes may come again
                committed = await self._blocking(self._partial.committed, node.node_id, update_id)
                return updates_pb2.QueryUploadResponse(committed_bytes=committed)
            return updates_pb2.QueryUploadResponse(
                committed_bytes=update.manifest.payload.size_bytes,
                receipt=await self._blocking(self._admission.receipt, update),
                state=update_state(update),
            )

    async def Upload(self, request_iterator: Requests, context: Context) -> updates_pb2.UploadResponse:
        peer = self._authenticator.peer(context)
        with self._uploads.one(peer.name):
            header = await self._read_header(request_iterator)
            async with self._streams.one(peer.name, sha256_hex(header.manifest)) as stream:
                return updates_pb2.UploadResponse(receipt=await self._upload(request_iterator, peer, header, stream))

    async def _upload(
        self, requests: Requests, peer: Peer, header: updates_pb2.UploadHeader, stream: Stream
    ) -> updates_pb2.Receipt:
        begun = self._threads.submit(self._admission.begin, peer, header)
        try:
            arrival = await asyncio.wrap_future(begun)
        except asyncio.CancelledError:
            begun.add_done_callback(self._let_go)  # its thread goes on, and opens the file
            await asyncio.wait([_unheard(begun)])  # so long it is one of the node's uploads
            raise
        if isinstance(arrival, updates_pb2.Receipt):
            return arrival
        turn = Turn(self._turns)
        try:
            return await self._receive_and_finish(requests, arrival, turn, stream)
        finally:
            turn.end()

    async def _receive_and_finish(
        self, requests: Requests, arrival: Arrival, turn: Turn, stream: Stream
    ) -> updates_pb2.Receipt:
        try:
            await self._receive(requests, arrival, turn, stream)
        except BaseException:
            # What came is there for who asks now, also when nobody hears this call's answer any more.
            await asyncio.wait([_unheard(self._threads.submit(arrival.incoming.close))])
            raise
        done: Future[updates_pb2.Receipt] = Future()
        turn.keep()
        self._threads.submit(self._admission.finish, arrival, _on_loop(turn.end), done)
        ended = _unheard(done)
        try:
            await asyncio.wait([ended])
        except (
            asyncio.CancelledError
        ):  # who hangs up changes nothing: it goes on to the end, and who asks now waits for it
            await asyncio.wait([ended])
            raise
        return ended.result()

    def _let_go(self, begun: Future[Arrival | updates_pb2.Receipt]) -> None:
        """Close what was opened for a call that has ended."""
        if not begun.cancelled() and not begun.exception() and isinstance(arrival := begun.result(), Arrival):
            self._threads.submit(arrival.incoming.close)

    async def _read_header(self, requests: Requests) -> updates_pb2.UploadHeader:
        async with self._patience(lambda: "an upload without a header"):
            request = await anext(requests, None)
        if request is None or request.WhichOneof("part") != "header":
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, "An upload begins with its header; none came."
            )
        return request.header

    async def _receive(self, requests: Requests, arrival: Arrival, turn: Turn, stream: Stream) -> None:
        """Take every chunk of a complete payload; what fills the last window is not written yet."""
        manifest, incoming = arrival.manifest, arrival.incoming
        update_id, size = incoming.update_id, manifest.payload.size_bytes
        permission = Permission(self._authenticator, arrival.peer)

        def what() -> str:
            return f"update {update_id}, of which {incoming.size} bytes are here"

        async with self._patience(what, stream) as patience:
            stream.waits(patience)
            async for request in requests:
                stream.works(patience)
                await permission.expect()
                chunk = request.chunk
                del request  # it holds a second copy, and many streams wait for the disk at once
                if not 0 < len(chunk) <= MAX_CHUNK_BYTES:
                    raise Refused(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        Reason.BAD_ARGUMENT,
                        f"A chunk of update {update_id} has {len(chunk)} bytes; expected 1 to {MAX_CHUNK_BYTES}.",
                    )
                if incoming.size + len(chunk) > size:
                    await self._blocking(self._partial.discard_own, incoming)
                    raise Refused(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        Reason.TOO_LARGE,
                        f"Update {update_id} goes on after the {size} bytes that its manifest names.",
                    )
                await self._take(arrival, chunk, turn)
                del chunk  # not held while the next one is waited for
                stream.waits(patience)
            stream.works(patience)
        if incoming.size < size:
            raise Refused(  # the bytes stay
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The upload of update {update_id} ended after {incoming.size} of {size} bytes. Go on from there.",
            )

    async def _take(self, arrival: Arrival, chunk: bytes, turn: Turn) -> None:
        incoming, size = arrival.incoming, arrival.manifest.payload.size_bytes
        rest = memoryview(chunk)
        while rest:
            await turn.begin()
            if incoming.is_behind:
                await self._blocking(incoming.catch_up)
            rest = incoming.take(rest)
            if incoming.is_full and incoming.size < size:
                turn.keep()
                await self._blocking(self._admission.write, arrival)
                turn.end()

    @asynccontextmanager
    async def _patience(self, what: Callable[[], str], stream: Stream | None = None) -> AsyncIterator[asyncio.Timeout]:
        """Raises Refused when the block, or what is left of it since the last `reschedule`, takes too long, or is taken over."""
        try:
            async with asyncio.timeout(self._idle_s) as patience:
                yield patience
        except TimeoutError:
            if stream is not None and stream.is_taken_over:
                raise taken_over(what()) from None
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.SILENT_STREAM,
                f"Nothing came for {self._idle_s:g} s (CENTRAL_LIMITS__UPLOAD_IDLE_S) of {what()}; central closed the stream. "
                "Ask QueryUpload and go on from there.",
            ) from None


def update_state(update: UpdateRecord) -> updates_pb2.UpdateState:
    """The wire's word for the state of an update."""
    return _STATES[update.state]


def _unheard(future: Future[T]) -> asyncio.Future[T]:
    """On this loop; its error is no news when nobody waits for it any more."""
    inner = asyncio.wrap_future(future)
    inner.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    return inner


def _on_loop(function: Callable[[], None]) -> Callable[[], None]:
    """For other threads; nothing happens when the loop has ended."""
    loop = asyncio.get_running_loop()

    def call() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(function)

    return call


def _expect_update_id(text: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.BAD_ARGUMENT,
            f"{text[:80]!r} is not an update id. Expected 64 lower-case hex digits.",
        )
    return text
