"""Admission: a complete update becomes part of the journal, exactly once.

In: a manifest, and the file that its payload was written to. Out: a signed receipt. Guarantees:
the payload is durable before the event, and the event before the receipt; a repeat returns the
same receipt, byte for byte; a node has at most one waiting update per start, also while it is in
quarantine. An admitted update whose payload was lost is taken once more, and waits again. Blocks
on disk and CPU: call it off the event loop.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import grpc
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from central import faults
from central.blobs import BlobStore
from central.errors import Reason, Refused
from central.fleet.identity import Authenticator, Peer
from central.intake.allowance import Allowance
from central.intake.checks import (
    Shapes,
    check_manifest,
    check_payload,
    check_signature,
    manifest_bytes,
)
from central.intake.commits import Commits
from central.intake.uploads import Upload, Uploads
from central.journal import EventKind, Journal, NewEvent, State, UpdateRecord
from central.settings import LimitSettings
from central.space import Space
from protos.base import BaseModelInfo
from protos.manifest import ReceiptBody, UpdateManifest
from protos.updates.v1 import updates_pb2

_PASSING = (grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
"""After these refusals a node goes on with what came. After any other it begins afresh."""
ALREADY_MERGED = (
    "the node's earlier update from this start is already merged or in a merge; the next round "
    "starts from a newer release"
)


@dataclass(frozen=True)
class Arrival:
    """An update whose payload is on its way."""

    peer: Peer
    manifest: UpdateManifest
    header: updates_pb2.UploadHeader
    upload: Upload


class Admission:
    """One per central. `key` signs receipts."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        uploads: Uploads,
        authenticator: Authenticator,
        key: ec.EllipticCurvePrivateKey,
        base: BaseModelInfo,
        limits: LimitSettings,
        space: Space,
        make_room: Callable[[str | None], bool],
    ) -> None:
        """`make_room` deletes what never merges, of one node or (None) of all.

        It says whether there was something.
        """
        self._journal = journal
        self._blobs = blobs
        self._uploads = uploads
        self._authenticator = authenticator
        self._key = key
        self._base = base.digest
        self._shapes: Shapes = base.module_shapes
        self._limits = limits
        self._max_manifest_bytes = manifest_bytes(base.module_shapes)
        self._allowance = Allowance(limits.node_updates_per_hour)
        self._space = space
        self._make_room = make_room
        self._commits = Commits(journal)

    def begin(
        self, peer: Peer, header: updates_pb2.UploadHeader, opened: ExitStack
    ) -> Arrival | updates_pb2.Receipt:
        """Check everything that needs no payload, and open the file for it; raises Refused.

        `opened` closes the file again. An update that is admitted already has its receipt at once.
        """
        node = self._authenticator.enrolled(peer)
        manifest = check_signature(
            node, header.manifest, header.signature, self._max_manifest_bytes
        )
        with self._journal.read() as state:
            known = state.updates.get(manifest.digest)
            if known is None:
                # Only here: releases and limits do not change. A node that changes its cohort gets
                # another certificate, and this one is refused at the end.
                check_manifest(state, node, manifest, self._base, self._limits)
                self._allowance.expect_one(node.node_id)
            is_done = known is not None and not state.updates.may_come_again(known)
        if known is not None and is_done:
            return self.receipt(known)
        self._expect_room(manifest, header.offset)
        faults.reach("intake.begun")
        upload = self._uploads.open(node.node_id, manifest.digest, header.offset)
        opened.callback(upload.close)
        return Arrival(peer, manifest, header, upload)

    def _expect_room(self, manifest: UpdateManifest, offset: int) -> None:
        """Raises Refused when the node's quota, or a disk, has no room for what is to come.

        What never merges is deleted first.
        """

        def expect_quota() -> None:
            with self._journal.read() as state:
                self._check_quota(state, manifest)

        node_id, to_come = manifest.node_id, max(0, manifest.payload.size_bytes - offset)
        for expect, whose in ((expect_quota, node_id), (lambda: self._space.expect(to_come), None)):
            try:
                expect()
            except Refused:
                if not self._make_room(whose):
                    raise
                expect()

    def write(self, arrival: Arrival, piece: bytes) -> None:
        """Append a piece of the payload; raises Refused when the disk has no room left."""
        self._space.expect(0)
        arrival.upload.write(piece)

    def finish(self, arrival: Arrival) -> updates_pb2.Receipt:
        """Check and keep a complete payload, and admit the update; central's receipt for it.

        Raises Refused. What is refused for good is dropped, because the quota would count it for a
        week.
        """
        manifest = arrival.manifest
        try:
            with self._counted(manifest):
                self._keep(arrival)
                update = self._admit(arrival)
        except Refused as error:
            if error.status not in _PASSING:
                self._uploads.discard_own(arrival.upload)
                self._delete_collected(manifest.payload.digest_sha256)
            raise
        self._uploads.discard(manifest.node_id, manifest.digest)
        return self.receipt(update)

    def _counted(self, manifest: UpdateManifest) -> AbstractContextManager[None]:
        """The block admits the update; a new one counts in the node's allowance."""
        with self._journal.read() as state:
            is_new = manifest.digest not in state.updates
        return self._allowance.one(manifest.node_id) if is_new else nullcontext()

    def _delete_collected(self, digest: str) -> None:
        """Retention may have deleted these bytes just before they got a place again."""
        with self._journal.read() as state:
            if digest in state.collected:
                self._blobs.delete(digest)

    def _keep(self, arrival: Arrival) -> None:
        """Check the file, and move its bytes to the blobs."""
        manifest, upload = arrival.manifest, arrival.upload
        # Nobody may discard the bytes between their check and their place.
        with upload.held():
            self._check_digest(arrival)
            check_payload(upload.path, manifest, self._shapes, self._limits.max_norm)
            self._expect_welcome(arrival)
            faults.reach("intake.checked")
            upload.sync()
            # They stay here too until the update is admitted. Should that fail, nothing has to be
            # sent again.
            self._blobs.put_file(upload.path, manifest.payload.digest_sha256)
        faults.reach("intake.kept")

    def _expect_welcome(self, arrival: Arrival) -> None:
        """Raises Refused for what the node may no longer do since the update began.

        It runs before the payload is kept, so a refused update leaves no blob that no event names.
        The quota is not checked again after this: of several updates of a node that end together,
        the last one to be checked sees all bytes of the others.
        """
        manifest = arrival.manifest
        with self._journal.read() as state:
            self._authenticator.enrolled(arrival.peer)
            # Who asks has the bytes, so it learns of nobody else's.
            _check_not_forgotten(state, manifest)
            if manifest.digest not in state.updates:
                self._check_quota(state, manifest)

    def _admit(self, arrival: Arrival) -> UpdateRecord:
        """Record the update whose payload is kept."""
        manifest = arrival.manifest
        make = partial(self._events, arrival)
        update = self._commits.admit(manifest.node_id, manifest.digest, make)
        faults.reach("intake.recorded")
        return update

    def _events(self, arrival: Arrival, state: State) -> list[NewEvent]:
        """What the journal has to record, as `state` is now, under the journal's lock.

        While the payload was kept, which takes seconds with a slow store, an operator may have
        revoked the node or ordered the payload to be forgotten, and retention may have collected
        an equal one.
        """
        manifest, header = arrival.manifest, arrival.header
        cohort = self._authenticator.enrolled(arrival.peer).cohort
        if (known := state.updates.get(manifest.digest)) is not None:
            return _comes_back(state, known)
        _check_not_forgotten(state, manifest)
        self._check_kept(state, manifest)
        signature = base64.b64encode(header.signature).decode()
        body = {"manifest": header.manifest.decode(), "signature": signature}
        admitted = NewEvent(EventKind.UPDATE_ADMITTED, cohort, manifest.digest, body)
        return [admitted, *_consequences(state, manifest, cohort)]

    def find(self, node_id: str, update_id: str) -> UpdateRecord | None:
        """The admitted update, if it is the node's own and central does not want its bytes."""
        with self._journal.read() as state:
            record = state.updates.get(update_id)
            if record is None or record.manifest.node_id != node_id:
                return None
            return None if state.updates.may_come_again(record) else record

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

    def _check_digest(self, arrival: Arrival) -> None:
        manifest, digest = arrival.manifest, arrival.upload.digest
        if digest == manifest.payload.digest_sha256:
            return
        if arrival.header.offset > 0:
            # Bytes of an earlier stream may be at fault, so this is not the node's last word.
            self._uploads.discard_own(arrival.upload)
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The resumed upload of update {manifest.digest} has digest {digest}; the manifest "
                f"says {manifest.payload.digest_sha256}. Central dropped its part: start again at "
                "byte 0.",
            )
        raise Refused(
            grpc.StatusCode.INVALID_ARGUMENT,
            Reason.DIGEST_MISMATCH,
            f"The payload has digest {digest}; the manifest says {manifest.payload.digest_sha256}.",
        )

    def _check_kept(self, state: State, manifest: UpdateManifest) -> None:
        digest = manifest.payload.digest_sha256
        if digest in state.collected and digest not in self._blobs:
            raise Refused(
                grpc.StatusCode.ABORTED,
                Reason.WRONG_OFFSET,
                f"The payload of update {manifest.digest} is the same as an earlier one that "
                "retention collected while this one came. Ask QueryUpload and go on from there.",
            )

    def _check_quota(self, state: State, manifest: UpdateManifest) -> None:
        kept = state.kept_bytes(manifest.node_id)
        held = kept + self._uploads.held_bytes(manifest.node_id, manifest.digest, state.updates)
        if held + manifest.payload.size_bytes > self._limits.node_quota_bytes:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.QUOTA_EXCEEDED,
                f"Node {manifest.node_id} has {held} bytes here that no release holds; "
                f"{manifest.payload.size_bytes} more would pass its quota of "
                f"{self._limits.node_quota_bytes} (CENTRAL_LIMITS__NODE_QUOTA_BYTES). Try again "
                "after the next merge; what is set aside goes with retention.",
            )


def _check_not_forgotten(state: State, manifest: UpdateManifest) -> None:
    """Raises Refused for bytes that an operator ordered to be forgotten.

    They may come under another manifest, perhaps of a site that enrolled again.
    """
    cohort = state.releases[manifest.start.release].cohort
    if state.is_forgotten_payload(cohort, manifest.payload.digest_sha256):
        raise Refused(
            grpc.StatusCode.FAILED_PRECONDITION,
            Reason.FORGOTTEN,
            f"Update {manifest.digest[:12]} has the same bytes as a contribution that an operator "
            f"of central ordered to be forgotten (payload {manifest.payload.digest_sha256[:12]}). "
            "It is not taken again; send what a later round learns.",
        )


def _comes_back(state: State, update: UpdateRecord) -> list[NewEvent]:
    """Let an update whose payload was lost wait again, because its bytes came again.

    It does not wait where the node's experience counts elsewhere already.
    """
    same = state.updates_from(update.manifest.node_id, update.manifest.start.release)
    counts = any(other.state in ("waiting", "planned", "merged", "quarantined") for other in same)
    is_kept_aside = state.nodes[update.manifest.node_id].quarantine
    if not state.updates.may_come_again(update) or counts or is_kept_aside:
        return []
    return [NewEvent(EventKind.UPDATE_REQUEUED, update.cohort, update.update_id)]


def _consequences(state: State, manifest: UpdateManifest, cohort: str) -> list[NewEvent]:
    """The other events of an admission: one experience must not count twice."""
    earlier = state.updates_from(manifest.node_id, manifest.start.release)
    if any(update.state in ("planned", "merged") for update in earlier):
        return [
            NewEvent(
                EventKind.UPDATE_SET_ASIDE, cohort, manifest.digest, {"reason": ALREADY_MERGED}
            )
        ]
    waiting = [update for update in earlier if update.state in ("waiting", "quarantined")]
    newer = next(
        (update for update in waiting if update.manifest.sequence > manifest.sequence), None
    )
    if newer is not None:  # it overtook this one on the way
        return [
            NewEvent(EventKind.UPDATE_SUPERSEDED, cohort, manifest.digest, {"by": newer.update_id})
        ]
    return [
        NewEvent(EventKind.UPDATE_SUPERSEDED, cohort, update.update_id, {"by": manifest.digest})
        for update in waiting
    ]
