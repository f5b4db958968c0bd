"""What the journal is made of: kinds of events, one event, and the hash that chains it to the one
before.

In: field values. Out: immutable events. Guarantee: an event's hash covers every other field but its
seal, the previous hash included, so that no stored event can be altered, dropped or re-ordered
without breaking the chain after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from central.clock import wall_time
from central.errors import CentralError, StorageError
from protos.manifest import canonical_json, sha256_hex

FIRST_HASH = "0" * 64
"""Previous hash of the first event."""


class JournalConflict(CentralError, ValueError):
    """An event does not fit the state (for example an update that is no longer waiting); nothing was written."""


class JournalCorrupt(StorageError):
    """A stored event does not fit the chain; the message names it."""


class EventKind(StrEnum):
    """What can happen. The comment beside a kind gives its subject and the keys of its body."""

    TOKEN_CREATED = "token_created"  # token id: secret_sha256, uses, expires_at, by, readmits (node id; absent: none)
    TOKEN_REVOKED = "token_revoked"  # token id: reason, by, by
    NODE_ENROLLED = "node_enrolled"  # node id: name, token_id, public_key_pem, base, certificate_sha256
    NODE_REVOKED = "node_revoked"  # node id: by
    NODE_QUARANTINED = "node_quarantined"  # node id: reason, by
    NODE_RELEASED = "node_released"  # node id, out of quarantine: by
    NODE_SILENT = "node_silent"  # node id: offer_id (the evaluation that it held up without a result)
    COHORT_CREATED = "cohort_created"  # release id of version 0: manifest, signature (base64), builds_on (absent: none)
    TRAIN_OFFERED = "train_offered"  # offer id: max_rank
    UPDATE_ADMITTED = "update_admitted"  # update id: manifest (canonical JSON), signature (base64)
    UPDATE_SUPERSEDED = "update_superseded"  # update id: by
    UPDATE_SET_ASIDE = (
        "update_set_aside"  # update id: reason, by (an operator's name; absent: central), lost (true: its payload is gone or
        # damaged, and its node may send the bytes again; absent: not)
    )
    UPDATE_REQUEUED = "update_requeued"  # update id: by (an operator's name; absent: central)
    FORGET_ORDERED = "forget_ordered"  # order id: node_id ("": single updates), updates, accept_loss, by
    FORGET_FAILED = "forget_failed"  # order id: reason, by (an operator's name; absent: central)
    MERGE_PLANNED = "merge_planned"  # plan id: plan (canonical JSON of MergePlan)
    CANDIDATE_BUILT = "candidate_built"  # release id: plan_id, manifest, signature, server_state (digest; absent: none)
    EVALUATION_OFFERED = (
        "evaluation_offered"  # offer id: candidate, reference, tasks, deadline_at, nodes; absent in old ones: look (1),
        # references {environment: release}, suites {environment: {first_task, tasks}}, so_far, attempts, temperature
    )
    EVALUATION_REPORTED = "evaluation_reported"  # offer id: node_id, results, abstain_reason
    VERDICT = (
        "verdict"  # release id: accepted, text, environments, high_water, isolate (true: updates wait, tried in parts),
        # loss_accepted_by (an operator accepted a removal that the gate rejected)
    )
    PROMOTED = "promoted"  # release id: channel, by, ends (channels that point nowhere from now on; absent: none)
    CANARY_REPORTED = "canary_reported"  # release id: node_id, condition (serving|trouble|left), problem
    RELEASE_SERVED = "release_served"  # release id: node_id (it says that it serves this one now)
    BLOBS_COLLECTED = "blobs_collected"  # collection id: blobs [{digest, size_bytes, reason}], by; deleted from then on
    JOURNAL_LOSS_ACCEPTED = (
        "journal_loss_accepted"  # sequence and hash of the head that was lost (0: no head was there), by
    )
    COLLECTION_FINISHED = "collection_finished"  # collection id: all of them are deleted
    ROLLED_BACK = (
        "rolled_back"  # release id returned to: from_release, abandoned, updates (requeue|set_aside), by, channel
        # (absent: stable)
    )


@dataclass(frozen=True)
class NewEvent:
    """An event before the journal has numbered it. `body` holds JSON values only."""

    kind: EventKind
    cohort: str = ""
    subject: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """One recorded event. `at` is RFC 3339 UTC; `hash` is SHA-256 over the canonical JSON of all
    other fields but `seal`.
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
    """Central's signature over number and hash (head.py), on the last event of every append; empty
    on the others.
    """

    @property
    def expected_hash(self) -> str:
        """The hash that the other fields imply."""
        return _hash(self.sequence, self.at, self.kind, self.cohort, self.subject, self.body, self.previous_hash)


def chain(new: NewEvent, sequence: int, at: str, previous_hash: str) -> Event:
    """`new` as the event with number `sequence`, following the event with hash `previous_hash`."""
    body = dict(new.body)
    digest = _hash(sequence, at, new.kind, new.cohort, new.subject, body, previous_hash)
    return Event(sequence, at, new.kind, new.cohort, new.subject, body, previous_hash, digest)


def utc_now() -> str:
    """What the machine's clock says, as RFC 3339 UTC with microseconds: for texts, not for ages (central/clock.py)."""
    return wall_time().isoformat(timespec="microseconds").replace("+00:00", "Z")


def _hash(
    sequence: int, at: str, kind: str, cohort: str, subject: str, body: Mapping[str, Any], previous_hash: str
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
