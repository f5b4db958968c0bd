"""UpdateService: resumable uploads of updates.

In: streams of enrolled nodes. Out: signed receipts. Guarantees: an update is acknowledged only when it is on disk and
in the journal; a cut upload goes on at the byte that QueryUpload names; a node sees only its own updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Peer, read_peer
from central.intake.admission import Admission
from central.intake.partial import PartialUploads, expect_offset
from central.journal import UpdateRecord
from central.journal.records import UpdateStateName
from protos.manifest import CHUNK_BYTES, UpdateManifest
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_STATES: dict[UpdateStateName, updates_pb2.UpdateState] = {
    "waiting": updates_pb2.UPDATE_STATE_WAITING,
    "planned": updates_pb2.UPDATE_STATE_PLANNED,
    "merged": updates_pb2.UPDATE_STATE_MERGED,
    "superseded": updates_pb2.UPDATE_STATE_SUPERSEDED,
    "set_aside": updates_pb2.UPDATE_STATE_SET_ASIDE,
}


class UpdateService(updates_pb2_grpc.UpdateServiceServicer):
    """Served on the mutual-TLS port."""

    def __init__(self, admission: Admission, partial: PartialUploads, authenticator: Authenticator) -> None:
        self._admission = admission
        self._partial = partial
        self._authenticator = authenticator

    async def QueryUpload(
        self, request: updates_pb2.QueryUploadRequest, context: Context
    ) -> updates_pb2.QueryUploadResponse:
        node = await self._authenticator.node(context)
        update_id = _expect_update_id(request.update_id)
        update = await asyncio.to_thread(self._admission.find, node.node_id, update_id)
        if update is None:
            committed = await asyncio.to_thread(self._partial.committed, node.node_id, update_id)
            return updates_pb2.QueryUploadResponse(committed_bytes=committed)
        return updates_pb2.QueryUploadResponse(
            committed_bytes=update.manifest.payload.size_bytes,
            receipt=await asyncio.to_thread(self._admission.receipt, update),
            state=update_state(update),
        )

    async def Upload(
        self, request_iterator: AsyncIterator[updates_pb2.UploadRequest], context: Context
    ) -> updates_pb2.UploadResponse:
        await self._authenticator.node(context)
        peer = read_peer(context)
        header = await _read_header(request_iterator)
        manifest = await asyncio.to_thread(self._admission.begin, peer, header.manifest, header.signature)
        known = await asyncio.to_thread(self._admission.find, manifest.node_id, manifest.digest)
        if known is None:
            await self._receive(request_iterator, peer, header, manifest)
        receipt = await asyncio.to_thread(
            self._admission.finish, peer, header.manifest, header.signature, header.offset > 0
        )
        return updates_pb2.UploadResponse(receipt=receipt)

    async def _receive(
        self,
        requests: AsyncIterator[updates_pb2.UploadRequest],
        peer: Peer,
        header: updates_pb2.UploadHeader,
        manifest: UpdateManifest,
    ) -> None:
        offset, update_id, size = header.offset, manifest.digest, manifest.payload.size_bytes
        expect_offset(update_id, offset, await asyncio.to_thread(self._partial.committed, peer.name, update_id))
        async for request in requests:
            chunk = request.chunk
            if not 0 < len(chunk) <= CHUNK_BYTES:
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    Reason.BAD_ARGUMENT,
                    f"A chunk of update {update_id} has {len(chunk)} bytes; expected 1 to {CHUNK_BYTES}.",
                )
            if offset + len(chunk) > size:
                await asyncio.to_thread(self._partial.discard, peer.name, update_id)
                raise Refused(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    Reason.TOO_LARGE,
                    f"Update {update_id} goes on after the {size} bytes that its manifest names.",
                )
            await asyncio.to_thread(self._partial.write, peer.name, update_id, offset, chunk)
            offset += len(chunk)
        if offset < size:
            # The bytes stay: the next attempt goes on from here.
            await asyncio.to_thread(self._partial.committed, peer.name, update_id)
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The upload of update {update_id} ended after {offset} of {size} bytes. Go on from there.",
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
