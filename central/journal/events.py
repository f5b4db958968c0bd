"""What the journal is made of: kinds of events, one event, and the hash that chains events.

In: field values. Out: immutable events. Guarantee: an event's hash covers every field but its seal,
also the hash of the event before. So no stored event can be altered, dropped or re-ordered without
breaking the chain after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from central.errors import CentralError, StorageError
from lorikeet.clock import wall_time
from protos.manifest import canonical_json, sha256_hex

FIRST_HASH = "0" * 64
"""Previous hash of the first event."""


class JournalConflict(CentralError, ValueError):
    """An event does not fit the state, so nothing was written.

    For example, its update is no longer waiting.
    """


class JournalCorrupt(StorageError):
    """A stored event does not fit the chain; the message names it."""


class EventKind(StrEnum):
    """What can happen.

    The lines under a kind give its subject and the keys of its body. A key in brackets may be
    absent.
    """

    TOKEN_CREATED = "token_created"
    # token id: secret_sha256, uses, expires_at, by, [readmits: a revoked node's id]
    TOKEN_REVOKED = "token_revoked"
    # token id: reason, by
    NODE_ENROLLED = "node_enrolled"
    # node id: name, token_id, public_key_pem, base, certificate_sha256
    NODE_REVOKED = "node_revoked"
    # node id: by
    NODE_QUARANTINED = "node_quarantined"
    # node id: reason, by
    NODE_RELEASED = "node_released"
    # node id, out of quarantine: by
    NODE_SILENT = "node_silent"
    # node id: offer_id (the evaluation that it held up without a result)
    COHORT_CREATED = "cohort_created"
    # release id of version 0: manifest, signature (base64), [builds_on: a cohort]
    TRAIN_OFFERED = "train_offered"
    # offer id: max_rank
    UPDATE_ADMITTED = "update_admitted"
    # update id: manifest (canonical JSON), signature (base64)
    UPDATE_SUPERSEDED = "update_superseded"
    # update id: by (the newer update)
    UPDATE_SET_ASIDE = "update_set_aside"
    # update id: reason, [by: an operator's name], [lost: true when its payload is gone or damaged,
    # so that its node may send the bytes again]
    UPDATE_REQUEUED = "update_requeued"
    # update id: [by: an operator's name]
    FORGET_ORDERED = "forget_ordered"
    # order id: node_id ("": single updates), updates, accept_loss, by
    FORGET_FAILED = "forget_failed"
    # order id: reason, [by: an operator's name]
    MERGE_PLANNED = "merge_planned"
    # plan id: plan (canonical JSON of MergePlan)
    CANDIDATE_BUILT = "candidate_built"
    # release id: plan_id, manifest, signature, [server_state: digest]
    EVALUATION_OFFERED = "evaluation_offered"
    # offer id: candidate, reference, tasks, deadline_at, nodes, [look: 1],
    # [references: {environment: release}], [suites: {environment: {first_task, tasks}}],
    # [so_far], [attempts: 1], [temperature: 0.0]
    EVALUATION_REPORTED = "evaluation_reported"
    # offer id: node_id, results, abstain_reason
    VERDICT = "verdict"
    # release id: accepted, text, environments, high_water, [isolate: true when its updates wait,
    # to be tried in parts], [loss_accepted_by: the operator who accepted what the gate rejected]
    PROMOTED = "promoted"
    # release id: channel, by, [ends: channels that point nowhere from now on]
    CANARY_REPORTED = "canary_reported"
    # release id: node_id, condition (serving|trouble|left), problem
    RELEASE_SERVED = "release_served"
    # release id: node_id (it says that it serves this one now)
    BLOBS_COLLECTED = "blobs_collected"
    # collection id: blobs [{digest, size_bytes, reason}], by; deleted from then on
    JOURNAL_LOSS_ACCEPTED = "journal_loss_accepted"
    # no subject: sequence and hash of the head that was lost (0: no head was there), by
    COLLECTION_FINISHED = "collection_finished"
    # collection id: all of them are deleted
    ROLLED_BACK = "rolled_back"
    # release id returned to: from_release, abandoned, updates (requeue|set_aside), by,
    # [channel: "stable"]


@dataclass(frozen=True)
class NewEvent:
    """An event before the journal has numbered it. `body` holds JSON values only."""

    kind: EventKind
    cohort: str = ""
    subject: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One recorded event.

    `at` is RFC 3339 UTC. `hash` is SHA-256 over the canonical JSON of all other fields but `seal`.
    """

    sequence: int
    at: str
    kind: EventKind
    cohort: str
    subject: str
    body: Mapping[str, Any]
    previous_hash: str
    hash: str
    seal: str = ""
    """Central's signature over number and hash (head.py).

    It is on the last event of every append, and empty on the others.
    """

    @property
    def expected_hash(self) -> str:
        """The hash that the other fields imply."""
        return _hash(
            self.sequence,
            self.at,
            self.kind,
            self.cohort,
            self.subject,
            self.body,
            self.previous_hash,
        )


def chain(new: NewEvent, sequence: int, at: str, previous_hash: str) -> Event:
    """`new` as the event with number `sequence`, following the event with hash `previous_hash`."""
    body = dict(new.body)
    digest = _hash(sequence, at, new.kind, new.cohort, new.subject, body, previous_hash)
    return Event(sequence, at, new.kind, new.cohort, new.subject, body, previous_hash, digest)


def utc_now() -> str:
    """The machine's clock, as RFC 3339 UTC with microseconds.

    For texts only; ages are counted otherwise (lorikeet/clock.py).
    """
    return wall_time().isoformat(timespec="microseconds").replace("+00:00", "Z")


def _hash(
    sequence: int,
    at: str,
    kind: str,
    cohort: str,
    subject: str,
    body: Mapping[str, Any],
    previous_hash: str,
) -> str:
    return sha256_hex(
        canonical_json(
            {
                "at": at,
                "body": dict(body),
                "cohort": cohort,
                "kind": str(kind),
                "previous_hash": previous_hash,
                "sequence": sequence,
                "subject": subject,
            }
        )
    )
