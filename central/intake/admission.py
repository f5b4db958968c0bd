"""Admission: a validated update becomes part of the journal, exactly once.

In: a manifest and its payload, of which the last piece may not be on disk yet. Out: a signed receipt. Guarantees: the
payload is durable before the event, the event before the receipt; a repeat returns the same receipt, byte for byte; at
most one waiting update per node and start, also while the node is in quarantine. An admitted update whose payload was lost is
taken once more, and waits again. Blocks on disk and CPU: call it off the event loop.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from central import faults
from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Peer
from central.intake.bounds import Allowance, manifest_bytes
from central.intake.group_commit import GroupCommit
from central.intake.partial import Incoming, PartialUploads
from central.intake.validation import PayloadCheck, Shapes, check_manifest, check_signature
from central.journal import EventKind, Journal, NewEvent, State, UpdateRecord
from central.registry import BlobStore
from central.settings import LimitSettings
from central.space import Space
from protos.base import BaseModelInfo
from protos.manifest import ReceiptBody, UpdateManifest
from protos.updates.v1 import updates_pb2

_PASSING = (grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""Refusals after which a node goes on with what came; after others that pass (a revoked node) it begins afresh."""
ALREADY_MERGED = "the node's earlier update from this start is already merged or in a merge; the next round starts from a newer release"


@dataclass(frozen=True)
class Arrival:
    """An update whose payload comes."""

    peer: Peer
    manifest: UpdateManifest
    header: updates_pb2.UploadHeader
    incoming: Incoming
    check: PayloadCheck

    @property
    def is_resumed(self) -> bool:
        return self.header.offset > 0


class Admission:
    """One per central. `key` signs receipts."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        partial: PartialUploads,
        authenticator: Authenticator,
        key: ec.EllipticCurvePrivateKey,
        base: BaseModelInfo,
        limits: LimitSettings,
        space: Space,
        make_room: Callable[[str | None], bool],
    ) -> None:
        """`make_room` deletes what never merges: of a node, or (None) of all; it says whether there was something."""
        self._journal = journal
        self._blobs = blobs
        self._partial = partial
        self._authenticator = authenticator
        self._key = key
        self._base = base.digest
        self._shapes: Shapes = base.module_shapes
        self._limits = limits
        self._max_manifest_bytes = manifest_bytes(base.module_shapes)
        self._allowance = Allowance(limits.node_updates_per_hour)
        self._space = space
        self._make_room = make_room
        self._commits = GroupCommit(journal)

    def begin(self, peer: Peer, header: updates_pb2.UploadHeader) -> Arrival | updates_pb2.Receipt:
        """Check everything that needs no payload, and open the place for it; the receipt when the update is admitted already.

        Raises Refused.
        """
        node = self._authenticator.enrolled(peer)
        manifest = check_signature(node, header.manifest, header.signature, self._max_manifest_bytes)
        with self._journal.read() as state:
            known = state.updates.get(manifest.digest)
            if known is None:
                check_manifest(state, node, manifest, self._base, self._limits)
                self._allowance.expect_one(node.node_id)
        if known is not None and not known.lost:
            return self.receipt(known)
        self._expect_room(manifest, header.offset)
        faults.reach("intake.begun")
        check = PayloadCheck(manifest, self._shapes, self._limits)
        incoming = self._partial.open(node.node_id, manifest.digest, header.offset, check.feed)
        return Arrival(peer, manifest, header, incoming, check)

    def _expect_room(self, manifest: UpdateManifest, offset: int) -> None:
        """Raises Refused when the node's quota, or a disk, has no room for what is to come, also without what never merges."""

        def check() -> None:
            with self._journal.read() as state:
                self._check_quota(state, manifest)

        node_id, to_come = manifest.node_id, max(0, manifest.payload.size_bytes - offset)
        for expect, whose in ((check, node_id), (lambda: self._space.expect(to_come), None)):
            try:
                expect()
            except Refused:
                if not self._make_room(whose):
                    raise
                expect()

    def write(self, arrival: Arrival) -> None:
        """Write the window of a payload that still comes; raises Refused when the disk has no room left."""
        self._space.expect(0)
        arrival.incoming.write()

    def finish(self, arrival: Arrival, written: Callable[[], None], done: Future[updates_pb2.Receipt]) -> None:
        """Write the end of a complete payload, check and keep it, and admit the update; `done` gets central's receipt for it.

        All of it in one go, because each change of threads costs as much as hashing 100 KB. `written` is called when the payload needs no
        window any more. `done` may get Refused.
        """
        try:
            try:
                self._keep(arrival, written)
            finally:
                arrival.incoming.close()
            self._admit(arrival, done)
        except BaseException as error:
            self._fail(arrival, error, done)

    def _keep(self, arrival: Arrival, written: Callable[[], None]) -> None:
        manifest, incoming = arrival.manifest, arrival.incoming
        # Another stream of the same update must not change the bytes between their check and their place among the blobs.
        with incoming.held():
            incoming.write()
            written()
            try:
                _check_digest(arrival)
                arrival.check.finish(incoming.path)
            except Refused:
                self._partial.discard_own(incoming)
                raise
            # Again when it is recorded; here so that what is refused leaves no blob, which no event would name.
            with self._journal.read() as state:
                _check_not_forgotten(state, manifest)  # whoever asks has the bytes: it learns of nobody else's
                if manifest.digest not in state.updates:
                    self._check_again(state, arrival)
            faults.reach("intake.checked")
            # They stay here too until the update is admitted: should that fail, nothing has to be sent again.
            self._blobs.put_file(incoming.path, manifest.payload.digest_sha256)

    def _admit(self, arrival: Arrival, done: Future[updates_pb2.Receipt]) -> None:
        """Record the update whose payload is kept."""
        manifest, header = arrival.manifest, arrival.header
        update_id = manifest.digest
        signature = base64.b64encode(header.signature).decode()

        def events(state: State) -> list[NewEvent]:
            if update_id in state.updates:
                self._authenticator.enrolled(arrival.peer)
                return _comes_back(state, state.updates[update_id])
            cohort = self._check_again(state, arrival)
            _check_not_forgotten(state, manifest)
            self._check_kept(state, manifest)
            body = {"manifest": header.manifest.decode(), "signature": signature}
            admitted = NewEvent(EventKind.UPDATE_ADMITTED, cohort, update_id, body)
            return [admitted, *_consequences(state, manifest, cohort)]

        def answer(update: UpdateRecord) -> updates_pb2.Receipt:
            faults.reach("intake.recorded")
            self._allowance.take_one(manifest.node_id)
            self._partial.discard(manifest.node_id, update_id)
            return self.receipt(update)

        def end(ended: Future[updates_pb2.Receipt]) -> None:
            error = ended.exception()
            if error is None:
                done.set_result(ended.result())
            else:
                self._fail(arrival, error, done)

        faults.reach("intake.kept")
        admitted: Future[updates_pb2.Receipt] = Future()
        admitted.add_done_callback(end)
        self._commits.admit(manifest.node_id, update_id, events, answer, admitted)

    def _fail(self, arrival: Arrival, error: BaseException, done: Future[updates_pb2.Receipt]) -> None:
        """`done` gets `error`; what is refused for good is dropped, because the quota would count it for a week."""
        try:
            if isinstance(error, Refused) and error.status not in _PASSING:
                self._partial.discard_own(arrival.incoming)
        finally:
            done.set_exception(error)

    def _check_again(self, state: State, arrival: Arrival) -> str:
        """Raises Refused for what the node or its update may no longer do since it began; returns the node's cohort."""
        node = self._authenticator.enrolled(arrival.peer)
        check_manifest(state, node, arrival.manifest, self._base, self._limits)
        self._check_quota(state, arrival.manifest)
        return node.cohort

    def find(self, node_id: str, update_id: str) -> UpdateRecord | None:
        """The admitted update, if it is the node's own."""
        with self._journal.read() as state:
            record = state.updates.get(update_id)
        return record if record is not None and record.manifest.node_id == node_id else None

    def receipt(self, update: UpdateRecord) -> updates_pb2.Receipt:
        """Central's signed word about an admitted update."""
        faults.reach("intake.admitted")
        body = ReceiptBody(
            update_id=update.update_id,
            node_id=update.manifest.node_id,
            payload=update.manifest.payload.digest_sha256,
            admitted_at=update.admitted_at,
            journal_sequence=update.admitted_sequence,
            journal_hash=update.admitted_hash,
        ).to_bytes()
        # Deterministic ECDSA (RFC 6979): the same receipt again, whenever it is asked for.
        signature = self._key.sign(body, ec.ECDSA(SHA256(), deterministic_signing=True))
        return updates_pb2.Receipt(body=body, signature=signature)

    def _check_kept(self, state: State, manifest: UpdateManifest) -> None:
        digest = manifest.payload.digest_sha256
        if digest in state.collected and digest not in self._blobs:
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The payload of update {manifest.digest} is the same as an earlier one that retention collected while this one "
                "came. Ask QueryUpload and go on from there.",
            )

    def _check_quota(self, state: State, manifest: UpdateManifest) -> None:
        kept = state.kept_bytes(manifest.node_id)
        held = kept + self._partial.held_bytes(manifest.node_id, manifest.digest, state.updates)
        if held + manifest.payload.size_bytes > self._limits.node_quota_bytes:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.QUOTA_EXCEEDED,
                f"Node {manifest.node_id} has {held} bytes here that no release holds; {manifest.payload.size_bytes} more "
                f"would pass its quota of {self._limits.node_quota_bytes} (CENTRAL_LIMITS__NODE_QUOTA_BYTES). "
                "Try again after the next merge; what is set aside goes with retention.",
            )


def _check_digest(arrival: Arrival) -> None:
    manifest, digest = arrival.manifest, arrival.incoming.digest
    if digest == manifest.payload.digest_sha256:
        return
    if arrival.is_resumed:  # bytes of an earlier attempt may be at fault, so this is not the node's last word
        raise Refused(
            grpc.StatusCode.ABORTED,
            Reason.WRONG_OFFSET,
            f"The resumed upload of update {manifest.digest} has digest {digest}; the manifest says "
            f"{manifest.payload.digest_sha256}. Central dropped its part: start again at byte 0.",
        )
    raise Refused(
        grpc.StatusCode.INVALID_ARGUMENT,
        Reason.DIGEST_MISMATCH,
        f"The payload has digest {digest}; the manifest says {manifest.payload.digest_sha256}.",
    )


def _check_not_forgotten(state: State, manifest: UpdateManifest) -> None:
    """The same bytes under another manifest, perhaps of a site that enrolled again, would undo an operator's order."""
    cohort = state.releases[manifest.start.release].cohort
    if state.is_forgotten_payload(cohort, manifest.payload.digest_sha256):
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.FORGOTTEN,
            f"Update {manifest.digest[:12]} has the same bytes as a contribution that an operator of central ordered to be forgotten "
            f"(payload {manifest.payload.digest_sha256[:12]}). It is not taken again; send what a later round learns.",
        )


def _comes_back(state: State, update: UpdateRecord) -> list[NewEvent]:
    """An update whose payload was lost waits again now that its bytes came again, unless its experience counts elsewhere already."""
    same = state.updates_from(update.manifest.node_id, update.manifest.start.release)
    counts = any(other.state in ("waiting", "planned", "merged", "quarantined") for other in same)
    if not update.lost or counts or state.nodes[update.manifest.node_id].quarantine:
        return []
    return [NewEvent(EventKind.UPDATE_REQUEUED, update.cohort, update.update_id)]


def _consequences(state: State, manifest: UpdateManifest, cohort: str) -> list[NewEvent]:
    """What else follows when the update is admitted: one experience must not count twice."""
    earlier = state.updates_from(manifest.node_id, manifest.start.release)
    if any(update.state in ("planned", "merged") for update in earlier):
        return [NewEvent(EventKind.UPDATE_SET_ASIDE, cohort, manifest.digest, {"reason": ALREADY_MERGED})]
    waiting = [update for update in earlier if update.state in ("waiting", "quarantined")]
    newer = next((update for update in waiting if update.manifest.sequence > manifest.sequence), None)
    if newer is not None:  # the newer one overtook this one on the way
        return [NewEvent(EventKind.UPDATE_SUPERSEDED, cohort, manifest.digest, {"by": newer.update_id})]
    return [
        NewEvent(EventKind.UPDATE_SUPERSEDED, cohort, update.update_id, {"by": manifest.digest}) for update in waiting
    ]
