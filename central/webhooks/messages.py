"""What a webhook is told: journal events and standing problems as documents, and their signature.

In: an event with the state, or a problem. Out: a Message: the same id and bytes whenever it is made
of the same event. The form is that of Standard Webhooks (https://www.standardwebhooks.com), for
which many languages have a library. Pure.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

from central.errors import SettingsError
from central.journal import Event, EventKind, State
from central.operations_settings import EventGroup
from protos.manifest import canonical_json

KINDS: dict[EventKind, tuple[EventGroup, str]] = {
    EventKind.PROMOTED: ("release", "release.promoted"),
    EventKind.ROLLED_BACK: ("rollback", "release.rolled_back"),
    EventKind.VERDICT: ("problem", "problem.candidate_rejected"),
    EventKind.CANARY_REPORTED: ("problem", "problem.canary_in_trouble"),
    EventKind.NODE_QUARANTINED: ("problem", "problem.node_quarantined"),
    EventKind.FORGET_FAILED: ("problem", "problem.forget_failed"),
}
"""Kind of event -> what it belongs to, and its type. Not every verdict and report is a problem."""
SECRET_PREFIX = "whsec_"
LEAST_SECRET_BYTES = 24


@dataclass(frozen=True)
class Message:
    """message_id: the same at every try, so that a receiver can leave out what it knows."""

    message_id: str
    body: bytes


def of_event(event: Event, state: State, groups: frozenset[str]) -> Message | None:
    """None for an event that is not told."""
    if event.kind not in KINDS:
        return None
    group, kind = KINDS[event.kind]
    if group not in groups or not _matters(event):
        return None
    data: dict[str, Any] = {"cohort": event.cohort, "sequence": event.sequence}
    release = state.releases.get(event.subject)
    if release is not None:
        data |= {"release": release.label, "release_id": event.subject}
    else:
        data["subject"] = event.subject
    for name in ("channel", "by", "reason", "text", "node_id", "problem", "from_release"):
        if name in event.body:
            data[name] = event.body[name]
    if event.kind in (EventKind.PROMOTED, EventKind.ROLLED_BACK):
        data.setdefault("channel", "stable")
    return _message(f"event-{event.sequence}-{event.hash[:16]}", kind, event.at, data)


def of_problem(key: str, at: str, began: bool, data: dict[str, Any]) -> Message:
    """A standing problem began, or is over; `key` is the problem's own."""
    kind = "problem.began" if began else "problem.ended"
    digest = hashlib.sha256(f"{key} {at} {kind}".encode()).hexdigest()
    return _message(f"problem-{digest[:32]}", kind, at, data)


def headers(message: Message, secret: bytes, at_s: int) -> dict[str, str]:
    """Of one try at `at_s`, in seconds since 1970: a receiver refuses what is too old."""
    signed = f"{message.message_id}.{at_s}.".encode() + message.body
    signature = base64.b64encode(hmac.new(secret, signed, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": message.message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": f"v1,{signature}",
    }


def read_secret(text: str, where: str) -> bytes:
    """The key in `whsec_<base64>`; raises SettingsError, which does not quote it."""
    try:
        secret = base64.b64decode(text.strip().removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not text.strip().startswith(SECRET_PREFIX) or len(secret) < LEAST_SECRET_BYTES:
        raise SettingsError(
            f"{where} holds no usable secret; expected {SECRET_PREFIX} and the base64 of at least "
            f"{LEAST_SECRET_BYTES} random bytes. Make one with `printf {SECRET_PREFIX}%s "
            '"$(openssl rand -base64 32)"`.'
        )
    return secret


def _matters(event: Event) -> bool:
    if event.kind is EventKind.VERDICT:
        return not event.body["accepted"]
    if event.kind is EventKind.CANARY_REPORTED:
        return bool(event.body["condition"] == "trouble")
    return True


def _message(message_id: str, kind: str, at: str, data: dict[str, Any]) -> Message:
    document = {"type": kind, "timestamp": at, "data": data}
    return Message(message_id, canonical_json(document))
