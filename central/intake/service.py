"""UpdateService: resumable uploads of updates.

In: streams of enrolled nodes. Out: signed receipts. Guarantees: an update is acknowledged only when it is on disk and
in the journal; a cut upload goes on at the byte that QueryUpload names; a node sees only its own updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

import grpc

from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, read_peer
from central.intake.admission import Admission
from central.intake.partial import Incoming, PartialUploads
from central.journal import UpdateRecord
from central.journal.records import UpdateStateName
from protos.manifest import CHUNK_BYTES, UpdateManifest
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

P = ParamSpec("P")
T = TypeVar("T")
THREADS = 8
"""They wait for the disk most of the time; with many more they would wait for Python's lock."""
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

    def __init__(self, admission: Admission, unfinished: PartialUploads, authenticator: Authenticator) -> None:
        self._admission = admission
        self._partial = unfinished
        self._authenticator = authenticator
        self._threads = ThreadPoolExecutor(THREADS, "intake")

    async def _blocking(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **named))

    async def QueryUpload(
        self, request: updates_pb2.QueryUploadRequest, context: Context
    ) -> updates_pb2.QueryUploadResponse:
        node = await self._authenticator.node(context)
        update_id = _expect_update_id(request.update_id)
        update = await self._blocking(self._admission.find, node.node_id, update_id)
        if update is None:
            committed = await self._blocking(self._partial.committed, node.node_id, update_id)
            return updates_pb2.QueryUploadResponse(committed_bytes=committed)
        return updates_pb2.QueryUploadResponse(
            committed_bytes=update.manifest.payload.size_bytes,
            receipt=await self._blocking(self._admission.receipt, update),
            state=update_state(update),
        )

    async def Upload(
        self, request_iterator: AsyncIterator[updates_pb2.UploadRequest], context: Context
    ) -> updates_pb2.UploadResponse:
        peer = read_peer(context)
        header = await _read_header(request_iterator)
        manifest, incoming = await self._blocking(self._admission.begin, peer, header)
        if incoming is None:
            return updates_pb2.UploadResponse(receipt=await self._blocking(self._receipt, manifest))
        try:
            await self._receive(request_iterator, incoming, manifest)
            await self._blocking(self._admission.keep, manifest, header, incoming)
        finally:
            self._threads.submit(incoming.close)  # not awaited: the call may be cancelled
        # Shielded: who hangs up now changes nothing, the update will be admitted.
        update = await asyncio.shield(asyncio.wrap_future(self._admission.admit(peer, manifest, header)))
        return updates_pb2.UploadResponse(receipt=await self._blocking(self._admission.receipt, update))

    def _receipt(self, manifest: UpdateManifest) -> updates_pb2.Receipt:
        known = self._admission.find(manifest.node_id, manifest.digest)
        assert known is not None, "an admitted update stays admitted"
        return self._admission.receipt(known)

    async def _receive(
        self, requests: AsyncIterator[updates_pb2.UploadRequest], incoming: Incoming, manifest: UpdateManifest
    ) -> None:
        update_id, size = manifest.digest, manifest.payload.size_bytes
        async for request in requests:
            chunk = request.chunk
            del request  # it holds a second copy, and many streams wait for the disk at once
            if not 0 < len(chunk) <= CHUNK_BYTES:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    Reason.BAD_ARGUMENT,
                    f"A chunk of update {update_id} has {len(chunk)} bytes; expected 1 to {CHUNK_BYTES}.",
                )
            if incoming.size + len(chunk) > size:
                await self._blocking(self._partial.discard, manifest.node_id, update_id)
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    Reason.TOO_LARGE,
                    f"Update {update_id} goes on after the {size} bytes that its manifest names.",
                )
            await self._blocking(incoming.write, chunk)
        if incoming.size < size:
            # The bytes stay: the next attempt goes on from here.
            await self._blocking(self._partial.committed, manifest.node_id, update_id)
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The upload of update {update_id} ended after {incoming.size} of {size} bytes. Go on from there.",
            )


def update_state(update: UpdateRecord) -> updates_pb2.UpdateState:
    """The wire's word for the state of an update."""
    return _STATES[update.state]


async def _read_header(requests: AsyncIterator[updates_pb2.UploadRequest]) -> updates_pb2.UploadHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, "An upload begins with its header; none came.")


def _expect_update_id(text: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.BAD_ARGUMENT,
            f"{text[:80]!r} is not an update id. Expected 64 lower-case hex digits.",
        )
    return text
