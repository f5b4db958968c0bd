"""ReleaseService: releases and candidates for nodes.

In: calls of enrolled nodes. Out: signed manifests, payloads from any offset, and evaluation reports
in the journal. Guarantees: a node sees only releases of its own cohort; no node gets the last bytes
of a payload that is not what was released; the first report of a node for an offer counts.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from central.blobs.store import BlobStore
from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Permission
from central.journal import EventKind, Journal, NewEvent, NodeRecord, ReleaseRecord, State
from central.releases.registry import CHANNELS, expect_kept
from central.releases.reports import MAX_REASON, check_report, check_results, plain_result
from lorikeet.clock import wall_time
from protos.manifest import CHUNK_BYTES, Payload
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

log = logging.getLogger(__name__)
SKIP_BYTES = 4 << 20
Context = grpc.aio.ServicerContext[Any, Any]


class ReleaseService(releases_pb2_grpc.ReleaseServiceServicer):
    """Served on the mutual-TLS port."""

    def __init__(self, journal: Journal, blobs: BlobStore, authenticator: Authenticator) -> None:
        self._journal = journal
        self._blobs = blobs
        self._authenticator = authenticator

    async def GetHead(
        self, request: releases_pb2.GetHeadRequest, context: Context
    ) -> releases_pb2.GetHeadResponse:
        node = await self._authenticator.node(context)
        if request.channel not in CHANNELS:
            raise Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.BAD_ARGUMENT,
                f"Channel {request.channel!r} is not known. Expected one of {', '.join(CHANNELS)}.",
            )
        head = await asyncio.to_thread(self._head, node.cohort, request.channel)
        return releases_pb2.GetHeadResponse(
            head=signed_manifest(head), unix_time_s=int(wall_time().timestamp())
        )

    async def GetRelease(
        self, request: releases_pb2.GetReleaseRequest, context: Context
    ) -> releases_pb2.GetReleaseResponse:
        node = await self._authenticator.node(context)
        release = await asyncio.to_thread(self._release, node, request.release_id)
        return releases_pb2.GetReleaseResponse(release=signed_manifest(release))

    async def Download(
        self, request: releases_pb2.DownloadRequest, context: Context
    ) -> AsyncIterator[releases_pb2.DownloadResponse]:
        node = await self._authenticator.node(context)
        release = await asyncio.to_thread(self._kept_release, node, request.release_id)
        payload = release.manifest.payload
        if release.state == "withdrawn":
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.NOT_ACCEPTED,
                f"Release {release.manifest.label} is withdrawn: it holds a contribution that was "
                "forgotten, and is given to nobody any more. Ask for the head of a channel "
                "instead.",
            )
        if request.offset > payload.size_bytes:
            raise Refused(
                grpc.StatusCode.OUT_OF_RANGE,
                Reason.WRONG_OFFSET,
                f"Offset {request.offset} is beyond the payload's {payload.size_bytes} bytes. "
                "Start again from 0.",
            )
        found = hashlib.sha256()
        await asyncio.to_thread(self._skip, payload, request.offset, found)
        permission = Permission(self._authenticator, self._authenticator.peer(context))
        for begin in range(request.offset, payload.size_bytes, CHUNK_BYTES):
            await permission.expect()
            chunk = await asyncio.to_thread(self._read, payload, begin, found)
            yield releases_pb2.DownloadResponse(chunk=chunk)

    async def ReportEvaluation(
        self, request: releases_pb2.ReportEvaluationRequest, context: Context
    ) -> releases_pb2.ReportEvaluationResponse:
        node = await self._authenticator.node(context)
        await asyncio.to_thread(self._report, node, request)
        return releases_pb2.ReportEvaluationResponse()

    def _skip(self, payload: Payload, offset: int, found: Hash) -> None:
        """Read what the node has already, because the digest is over all of it."""
        for begin in range(0, offset, SKIP_BYTES):
            end = min(begin + SKIP_BYTES, offset)
            found.update(self._blobs.read_range(payload.digest_sha256, begin, end))
        if offset == payload.size_bytes:
            self._expect_intact(payload, found)

    def _read(self, payload: Payload, begin: int, found: Hash) -> bytes:
        """The next chunk; raises BlobLost.

        The last chunk is given only when all that was read is what was released.
        """
        end = min(begin + CHUNK_BYTES, payload.size_bytes)
        chunk = self._blobs.read_range(payload.digest_sha256, begin, end)
        found.update(chunk)
        if end == payload.size_bytes:
            self._expect_intact(payload, found)
        return chunk

    def _expect_intact(self, payload: Payload, found: Hash) -> None:
        if found.hexdigest() != payload.digest_sha256:
            raise self._blobs.altered(payload.digest_sha256, found.hexdigest())

    def _head(self, cohort: str, channel: str) -> ReleaseRecord:
        with self._journal.read() as state:
            return channel_head(state, cohort, channel)

    def _release(self, node: NodeRecord, release_id: str) -> ReleaseRecord:
        with self._journal.read() as state:
            release = state.releases.get(release_id)
        if release is None or release.cohort != node.cohort:
            raise Refused(
                grpc.StatusCode.NOT_FOUND,
                Reason.UNKNOWN_RELEASE,
                f"Release {release_id!r} is not known in cohort {node.cohort!r}. Ask for the head "
                "of a channel instead.",
            )
        return release

    def _kept_release(self, node: NodeRecord, release_id: str) -> ReleaseRecord:
        release = self._release(node, release_id)
        if release.state != "withdrawn":  # which has its own answer
            with self._journal.read() as state:
                expect_kept(state, release)
        return release

    def _report(self, node: NodeRecord, request: releases_pb2.ReportEvaluationRequest) -> None:
        check_report(request)
        with self._journal.read() as state:
            offer = state.evaluations.get(request.offer_id)
            if offer is None or node.node_id not in offer.nodes:
                raise Refused(
                    grpc.StatusCode.NOT_FOUND,
                    Reason.UNKNOWN_OFFER,
                    f"Evaluation offer {request.offer_id!r} was not made to node {node.node_id}. "
                    "Watch for open offers.",
                )
            if node.node_id in offer.reports:
                return
            if state.releases[offer.candidate].state != "candidate":
                log.info(
                    "evaluation came after the verdict",
                    extra={"node_id": node.node_id, "offer_id": offer.offer_id},
                )
                if not (state.nodes[node.node_id].silent_since and request.results):
                    return
                # Nobody waited for it; it shows that the next evaluation can wait again.
            check_results(request.results, offer)
            results = [plain_result(result) for result in request.results]
            reason = request.abstain_reason[:MAX_REASON]
            body = {"node_id": node.node_id, "results": results, "abstain_reason": reason}
            self._journal.append(
                NewEvent(EventKind.EVALUATION_REPORTED, node.cohort, offer.offer_id, body)
            )


def channel_head(state: State, cohort: str, channel: str) -> ReleaseRecord:
    """What a node that follows `channel` serves: without a canary, that is the stable head."""
    return state.head(cohort, channel) or state.head(cohort) or state.genesis(cohort)


def signed_manifest(release: ReleaseRecord) -> releases_pb2.SignedManifest:
    """The manifest exactly as it was signed."""
    return releases_pb2.SignedManifest(manifest=release.manifest_bytes, signature=release.signature)
