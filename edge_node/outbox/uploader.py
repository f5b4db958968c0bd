"""Brings waiting updates to central, oldest first, and keeps central's receipt.

In: the outbox and a channel. Out: entries that are admitted (with a verified receipt) or refused
(with central's reason). Each attempt asks what central has on disk and goes on from there, so a cut
link, a restarted node and a restarted central all cost only what was not yet committed. A failed
update waits with a backoff of its own and never holds up the next one.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc

from edge_node.errors import AdapterError, EdgeError, UpdateRefused
from edge_node.identity import Identity
from edge_node.outbox.store import Outbox, OutboxEntry, OutboxState
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from lorikeet import traces
from lorikeet.pauses import doubling
from protos.manifest import CHUNK_BYTES, ManifestError, ReceiptBody, verify
from protos.updates.v1 import updates_pb2, updates_pb2_grpc

log = logging.getLogger(__name__)
T = TypeVar("T")

REASON_KEY = "lorikeet-reason"
MAX_BACKOFF_S = 60.0
CHECK_DISK = "Check the disk of EDGE_DATA_DIR: its space and permissions."
CHECK_CENTRAL = (
    "Check that central runs and can be reached: `edge-node doctor`. The update is kept until then."
)
_FINAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
)
# About the transfer or the node, not about the update: it may well be admitted later.
_PASSING_REASONS = frozenset({"WRONG_OFFSET", "QUOTA_EXCEEDED", "UNKNOWN_NODE", "REVOKED_NODE"})


@dataclass
class _Backoff:
    pauses: Iterator[float]
    not_before: float = 0.0


class Uploader:
    """One per node. An update that fails or was refused is the problem of room `uploads`."""

    def __init__(
        self,
        outbox: Outbox,
        channel: grpc.aio.Channel,
        identity: Identity,
        settings: EdgeSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._stub = updates_pb2_grpc.UpdateServiceStub(channel)
        self._identity = identity
        self._first_pause_s = settings.outbox.retry_s
        self._deadline_s = settings.central.call_timeout_s
        self._clock = clock
        self._backoff: dict[str, _Backoff] = {}
        self._closed = asyncio.Event()
        self._problems = Problems(settings.data_dir)
        self._failures: dict[str, tuple[str, str]] = {}
        """By update that waits, why its last attempt failed, and the next step."""

    async def run(self) -> None:
        """Uploads until `aclose`. It polls the outbox: other processes add to it and approve."""
        while not self._closed.is_set():
            try:
                await self.upload_waiting()
            except (
                OSError,
                sqlite3.Error,
                EdgeError,
            ) as error:  # of the outbox itself: a full disk, a lock held too long
                self._problems.report(
                    "uploads", f"The outbox cannot be read ({error}); tried again.", CHECK_DISK
                )
            try:
                await asyncio.wait_for(self._closed.wait(), self._first_pause_s)
            except TimeoutError:
                pass

    async def aclose(self) -> None:
        """Stop after the call in flight; idempotent."""
        self._closed.set()

    async def upload_waiting(self) -> None:
        """One attempt for every waiting update that is due."""
        entries = await asyncio.to_thread(self._outbox.list, OutboxState.WAITING)
        waiting = {entry.update_id for entry in entries}
        self._failures = {
            update: why for update, why in self._failures.items() if update in waiting
        }
        for entry in entries:
            backoff = self._backoff.get(entry.update_id)
            if self._closed.is_set():
                return
            if backoff is None or backoff.not_before <= self._clock():
                await self._attempt(entry)
        await self._tell()

    async def _tell(self) -> None:
        """The oldest failure among those that wait; else the newest update, if it was refused."""
        if self._failures:
            self._problems.report("uploads", *next(iter(self._failures.values())))
            return
        refused = await asyncio.to_thread(self._outbox.refused_last)
        if refused is None:
            self._problems.clear("uploads")
            return
        update = f"{refused.update_id[:12]} (#{refused.sequence})"
        text = f"Central refused update {update} for good: {refused.reason}"
        self._problems.report(
            "uploads", text, "Do what the reason says; it is over when a later update is admitted."
        )

    async def _attempt(self, entry: OutboxEntry) -> None:
        fields = {"update_id": entry.update_id, "sequence": entry.sequence}
        began, result = self._clock(), "admitted"
        try:
            receipt = await self._upload(entry)
            self._check(receipt, entry)
            await asyncio.to_thread(
                self._outbox.mark_admitted, entry.update_id, receipt.body, receipt.signature
            )
            log.info("update admitted", extra=fields)
        except UpdateRefused as error:
            result = error.reason
            await asyncio.to_thread(
                self._outbox.mark_refused, entry.update_id, f"{error.reason}: {error}"
            )
            log.error(
                "update refused by central",
                extra=fields | {"reason": error.reason, "detail": str(error)},
            )
        except (grpc.aio.AioRpcError, TimeoutError, EdgeError, OSError, sqlite3.Error) as error:
            self._postpone(entry, error, fields)
            return
        traces.after(
            "upload",
            entry.update_id,
            self._clock() - began,
            update_id=entry.update_id,
            result=result,
        )
        self._backoff.pop(entry.update_id, None)
        self._failures.pop(entry.update_id, None)

    def _postpone(self, entry: OutboxEntry, error: Exception, fields: dict[str, object]) -> None:
        known = self._backoff.get(entry.update_id)
        backoff = known or _Backoff(doubling(self._first_pause_s, MAX_BACKOFF_S))
        backoff.not_before = self._clock() + next(backoff.pauses)
        self._backoff[entry.update_id] = backoff
        text = (
            f"{error.code().name}: {error.details()}"
            if isinstance(error, grpc.aio.AioRpcError)
            else repr(error)
        )
        here = isinstance(error, OSError | sqlite3.Error) and not isinstance(error, TimeoutError)
        self._failures[entry.update_id] = (
            f"Update {entry.update_id[:12]} could not be uploaded ({text}); tried again.",
            CHECK_DISK if here else CHECK_CENTRAL,
        )
        if known is None:  # repeats would only say the same again
            log.warning("update not uploaded yet", extra=fields | {"error": text})

    async def _upload(self, entry: OutboxEntry) -> updates_pb2.Receipt:
        """Raises UpdateRefused if central's refusal is final, else AioRpcError or TimeoutError."""
        try:
            known: updates_pb2.QueryUploadResponse = await self._stub.QueryUpload(
                updates_pb2.QueryUploadRequest(update_id=entry.update_id), timeout=self._deadline_s
            )
            if known.HasField("receipt"):
                return known.receipt
            return await self._send(entry, known.committed_bytes)
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
            if error.code() in _FINAL and reason and reason not in _PASSING_REASONS:
                raise UpdateRefused(
                    entry.update_id, reason, error.details() or "no details"
                ) from error
            raise

    async def _send(self, entry: OutboxEntry, offset: int) -> updates_pb2.Receipt:
        """Sends the payload from `offset`. The deadline limits silence: a slow link may finish."""
        manifest, signature = await asyncio.to_thread(self._outbox.signed, entry.update_id)
        header = updates_pb2.UploadHeader(manifest=manifest, signature=signature, offset=offset)
        call = self._stub.Upload()
        try:
            with self._outbox.payload_path(entry.round_id).open("rb") as payload:
                payload.seek(offset)
                request = updates_pb2.UploadRequest(header=header)
                while True:
                    try:
                        await self._in_time(call.write(request))
                    except (
                        asyncio.InvalidStateError
                    ):  # central ended the call early; awaiting it says why
                        break
                    chunk = await asyncio.to_thread(payload.read, CHUNK_BYTES)
                    if not chunk:
                        await self._in_time(call.done_writing())
                        break
                    request = updates_pb2.UploadRequest(chunk=chunk)
            answer: updates_pb2.UploadResponse = await self._in_time(call)
            return answer.receipt
        finally:
            call.cancel()

    async def _in_time(self, step: Awaitable[T]) -> T:
        return await asyncio.wait_for(step, self._deadline_s)

    def _check(self, receipt: updates_pb2.Receipt, entry: OutboxEntry) -> None:
        """Raises AdapterError unless the receipt is central's word about exactly this update."""
        try:
            verify(self._identity.release_key_pem, receipt.body, receipt.signature)
            body = ReceiptBody.from_bytes(receipt.body)
        except ManifestError as error:
            raise AdapterError(
                f"Central's receipt for update {entry.update_id[:12]} is not usable: {error}"
            ) from error
        if body.update_id != entry.update_id or body.node_id != self._identity.node_id:
            raise AdapterError(
                f"Central's receipt is for update {body.update_id[:12]} of {body.node_id}; "
                f"expected {entry.update_id[:12]} of {self._identity.node_id}."
            )


def _reason(error: grpc.aio.AioRpcError) -> str:
    # An AioRpcError's metadata is a mapping, grpc.aio.Metadata; grpc-stubs say otherwise.
    trailing = cast("Mapping[str, str]", error.trailing_metadata() or {})
    return trailing.get(REASON_KEY) or ""
