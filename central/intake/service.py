"""UpdateService: resumable uploads of updates.

In: streams of enrolled nodes. Out: signed receipts. Guarantees: an update is acknowledged only when
it is on disk and in the journal; a cut upload goes on at the byte that QueryUpload names; a node
sees only its own updates; of one update only the newest call counts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

import grpc

from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Peer, Permission
from central.fleet.streams import OpenStreams
from central.intake.admission import Admission, Arrival
from central.intake.uploads import Uploads
from central.journal import UpdateRecord
from central.journal.records import UpdateStateName
from central.settings import LimitSettings
from protos.manifest import sha256_hex
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
"""They wait for the disk most of the time; many more would wait for Python's lock."""
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
        self,
        admission: Admission,
        uploads: Uploads,
        authenticator: Authenticator,
        limits: LimitSettings,
    ) -> None:
        self._admission = admission
        self._uploads = uploads
        self._authenticator = authenticator
        self._idle_s = limits.upload_idle_s
        self._calls = OpenCalls(limits.upload_idle_s)
        self._streams = OpenStreams("uploads", limits.node_uploads, "CENTRAL_LIMITS__NODE_UPLOADS")
        self._queries = OpenStreams(
            "queries about uploads", limits.node_uploads, "CENTRAL_LIMITS__NODE_UPLOADS"
        )
        self._threads = ThreadPoolExecutor(THREADS, "intake")

    async def QueryUpload(
        self, request: updates_pb2.QueryUploadRequest, context: Context
    ) -> updates_pb2.QueryUploadResponse:
        node = await self._authenticator.node(context)
        update_id = _expect_update_id(request.update_id)
        with self._queries.one(node.node_id):
            await self._calls.take_over(node.node_id, update_id)
            return await self._in_thread(self._answer, node.node_id, update_id)

    def _answer(self, node_id: str, update_id: str) -> updates_pb2.QueryUploadResponse:
        update = self._admission.find(node_id, update_id)
        if update is None:
            committed = self._uploads.committed(node_id, update_id)
            return updates_pb2.QueryUploadResponse(committed_bytes=committed)
        return updates_pb2.QueryUploadResponse(
            committed_bytes=update.manifest.payload.size_bytes,
            receipt=self._admission.receipt(update),
            state=update_state(update),
        )

    async def Upload(
        self, request_iterator: Requests, context: Context
    ) -> updates_pb2.UploadResponse:
        peer = self._authenticator.peer(context)
        with self._streams.one(peer.name):
            header = await self._read_header(request_iterator)
            async with self._calls.one(peer.name, sha256_hex(header.manifest)) as call:
                receipt = await self._upload(request_iterator, peer, header, call)
                return updates_pb2.UploadResponse(receipt=receipt)

    async def _upload(
        self, requests: Requests, peer: Peer, header: updates_pb2.UploadHeader, call: OpenCall
    ) -> updates_pb2.Receipt:
        opened = ExitStack()
        try:
            arrival = await self._to_its_end(self._admission.begin, peer, header, opened)
            if isinstance(arrival, updates_pb2.Receipt):
                return arrival
            await self._receive(requests, arrival, call)
            return await self._to_its_end(self._admission.finish, arrival)
        finally:
            await asyncio.shield(self._in_thread(opened.close))

    async def _read_header(self, requests: Requests) -> updates_pb2.UploadHeader:
        async with self._patience(lambda: "an upload without a header"):
            request = await anext(requests, None)
        if request is None or request.WhichOneof("part") != "header":
            raise _bad_argument("An upload begins with its header; none came.")
        return request.header

    async def _receive(self, requests: Requests, arrival: Arrival, call: OpenCall) -> None:
        """Write every chunk to the end of the payload; raises Refused for too few or too many."""
        upload, size = arrival.upload, arrival.manifest.payload.size_bytes
        permission = Permission(self._authenticator, arrival.peer)

        def what() -> str:
            return f"update {upload.update_id}, of which {upload.size} bytes are here"

        async with self._patience(what, call) as patience:
            call.waits(patience)
            async for request in requests:
                call.works(patience)
                await permission.expect()
                chunk = request.chunk
                del request  # it holds a second copy, and many streams wait for the disk at once
                if not 0 < len(chunk) <= MAX_CHUNK_BYTES:
                    raise _bad_argument(
                        f"A chunk of update {upload.update_id} has {len(chunk)} bytes; expected "
                        f"1 to {MAX_CHUNK_BYTES}."
                    )
                if upload.size + len(chunk) > size:
                    await self._in_thread(self._uploads.discard_own, upload)
                    raise Refused(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        Reason.TOO_LARGE,
                        f"Update {upload.update_id} goes on after the {size} bytes that its "
                        "manifest names.",
                    )
                await self._to_its_end(self._admission.write, arrival, chunk)
                del chunk  # not held while the next one is waited for
                call.waits(patience)
            call.works(patience)
        if upload.size < size:
            raise Refused(  # the bytes stay
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The upload of update {upload.update_id} ended after {upload.size} of {size} "
                "bytes. Go on from there.",
            )

    @asynccontextmanager
    async def _patience(
        self, what: Callable[[], str], call: OpenCall | None = None
    ) -> AsyncIterator[asyncio.Timeout]:
        """Raises Refused when the block waits for too long, or another call takes over."""
        try:
            async with asyncio.timeout(self._idle_s) as patience:
                yield patience
        except TimeoutError:
            if call is not None and call.is_taken_over:
                raise Refused(
                    grpc.StatusCode.ABORTED,
                    Reason.TAKEN_OVER,
                    f"A newer call of the node goes on with {what()}; central closed this stream. "
                    "Ask QueryUpload and go on from there.",
                ) from None
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.SILENT_STREAM,
                f"Nothing came for {self._idle_s:g} s (CENTRAL_LIMITS__UPLOAD_IDLE_S) of {what()}; "
                "central closed the stream. Ask QueryUpload and go on from there.",
            ) from None
        finally:
            if call is not None:
                call.waits_no_longer()

    def _in_thread(
        self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs
    ) -> asyncio.Future[T]:
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, partial(function, *arguments, **named)
        )
        # Its error is no news when the call has ended and nobody waits for it any more.
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return work

    async def _to_its_end(
        self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs
    ) -> T:
        """What `function` returns. When the caller hangs up, the call still ends after its thread.

        So a newer call waits for that, and finds every byte that came.
        """
        work = self._in_thread(function, *arguments, **named)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise


class OpenCall:
    """One open upload. It waits for the next piece; a call that takes over ends that early."""

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._patience: asyncio.Timeout | None = None
        self.is_taken_over = False
        self.ended = asyncio.Event()

    def waits(self, patience: asyncio.Timeout) -> None:
        """The call waits for the next piece from now on."""
        self._patience = patience
        now = asyncio.get_running_loop().time()
        patience.reschedule(now if self.is_taken_over else now + self._idle_s)

    def works(self, patience: asyncio.Timeout) -> None:
        """The call has a piece, or all of them: the time from now on is central's."""
        self._patience = None
        patience.reschedule(None)

    def waits_no_longer(self) -> None:
        """Nothing more is waited for: the call ends, or its payload is complete."""
        self._patience = None

    def take_over(self) -> None:
        """Let the call end as soon as it has dealt with the piece that it has."""
        if not self.is_taken_over:
            self.is_taken_over = True
            if self._patience is not None and not self._patience.expired():
                self.waits(self._patience)


class OpenCalls:
    """The uploads that are open: of one update only the newest call counts.

    A connection may be cut and central not know it yet. Then the node's next call ends the older
    one. Used on the event loop alone.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._open: dict[tuple[str, str], OpenCall] = {}
        """By node and update."""

    async def take_over(self, node_id: str, update_id: str) -> None:
        """End the update's open call, if any, and wait until it has dealt with what came on it."""
        while (call := self._open.get((node_id, update_id))) is not None:
            call.take_over()
            await call.ended.wait()

    @asynccontextmanager
    async def one(self, node_id: str, update_id: str) -> AsyncIterator[OpenCall]:
        """The block is the update's only call; an older one has ended before."""
        await self.take_over(node_id, update_id)
        call = self._open[node_id, update_id] = OpenCall(self._idle_s)
        try:
            yield call
        finally:
            del self._open[node_id, update_id]
            call.ended.set()


def update_state(update: UpdateRecord) -> updates_pb2.UpdateState:
    """The wire's word for the state of an update."""
    return _STATES[update.state]


def _bad_argument(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, message)


def _expect_update_id(text: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise _bad_argument(
            f"{text[:80]!r} is not an update id. Expected 64 lower-case hex digits."
        )
    return text
