"""What an operator orders for single updates: set aside, or wait again.

In: ids of updates, whole or shortened. Out: journal events with the operator's name. Guarantees:
all of an order or nothing of it; of one node's updates from one start at most one waits or is
merged, so that no experience counts twice; an update whose payload is gone, or whose node is
revoked or in quarantine, never waits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import grpc

from central.errors import Reason, Refused
from central.journal import EventKind, Journal, NewEvent, State, UpdateRecord

MIN_PREFIX_DIGITS = 6
MAX_REASON = 500
_COUNTING = ("waiting", "planned", "merged", "quarantined")
"""States in which an update is merged, now or later."""


class Payloads(Protocol):
    """Which payloads the store has."""

    def __contains__(self, digest: object) -> bool: ...

    def holds(self, digest: str) -> bool:
        """Read the blob; whether it is there and whole."""


def requeue(journal: Journal, blobs: Payloads, texts: Sequence[str], by: str) -> list[UpdateRecord]:
    """Let set-aside updates wait again. Raises Refused and then changes nothing."""
    with journal.read() as state:
        lost = [
            update
            for update in (find_update(state, text) for text in _expect_some(texts))
            if update.lost
        ]
    _expect_whole(lost, blobs)  # reads blobs: not under the journal's lock
    with journal.read() as state:
        updates = [find_update(state, text) for text in texts]
        for update in updates:
            _expect_requeueable(state, update, blobs, {u.update_id for u in updates})
        journal.append(
            *(
                NewEvent(EventKind.UPDATE_REQUEUED, u.cohort, u.update_id, {"by": by})
                for u in updates
            ),
        )
        return [state.updates[update.update_id] for update in updates]


def set_aside(journal: Journal, texts: Sequence[str], reason: str, by: str) -> list[UpdateRecord]:
    """Keep updates from being merged. Raises Refused.

    A merge under way that holds one of them is given up, and its other updates wait again.
    """
    if not reason.strip() or len(reason) > MAX_REASON:
        raise refused(
            f"The reason has {len(reason.strip())} characters. Expected 1 to {MAX_REASON}: it is "
            "shown beside the update."
        )
    with journal.read() as state:
        updates = [find_update(state, text) for text in _expect_some(texts)]
        for update in updates:
            if update.state not in ("waiting", "planned", "quarantined"):
                raise refused(
                    f"Update {update.update_id[:12]} is {_words(update)}; only one that waits, is "
                    f"in a merge under way or in quarantine can be set aside. {_instead(update)}"
                )
        body = {"reason": f"{by}: {reason.strip()}", "by": by}
        journal.append(
            *(NewEvent(EventKind.UPDATE_SET_ASIDE, u.cohort, u.update_id, body) for u in updates)
        )
        return [state.updates[update.update_id] for update in updates]


def find_update(state: State, text: str) -> UpdateRecord:
    """The update with this id or unique id prefix (6 digits or more); raises Refused."""
    if text in state.updates:
        return state.updates[text]
    long_enough = len(text) >= MIN_PREFIX_DIGITS
    found = [
        update
        for update in state.updates.values()
        if long_enough and update.update_id.startswith(text)
    ]
    if len(found) != 1:
        problem = "is not known" if not found else f"fits {len(found)} updates"
        raise Refused(
            grpc.StatusCode.NOT_FOUND,
            Reason.BAD_ARGUMENT,
            f"Update {text[:80]!r} {problem}. Expected an id, or {MIN_PREFIX_DIGITS} or more of "
            "its first digits; `central updates` shows them.",
        )
    return found[0]


def refused(message: str) -> Refused:
    """The refusal of an order that does not fit the state."""
    return Refused(grpc.StatusCode.FAILED_PRECONDITION, Reason.BAD_ARGUMENT, message)


def _expect_some(texts: Sequence[str]) -> Sequence[str]:
    if not texts or len(set(texts)) != len(texts):
        raise refused(
            f"{len(texts)} updates are named, {len(set(texts))} of them different. Expected each "
            "once, and at least one."
        )
    return texts


def _expect_requeueable(
    state: State, update: UpdateRecord, blobs: Payloads, together: Collection[str]
) -> None:
    name, node = update.update_id[:12], state.nodes[update.manifest.node_id]
    if update.state != "set_aside":
        raise refused(
            f"Update {name} is {_words(update)}; only one that is set aside can wait again. "
            f"{_instead(update)}"
        )
    if node.revoked:
        raise refused(
            f"Update {name} is of node {node.node_id}, which is revoked. Let the site enrol again; "
            "it can send anew."
        )
    if node.quarantine:
        raise refused(
            f"Update {name} is of node {node.node_id}, which is in quarantine: {node.quarantine}. "
            f"First `central nodes release {node.node_id}`."
        )
    if state.is_forgotten_payload(update.cohort, update.manifest.payload.digest_sha256):
        raise refused(
            f"Update {name} has the same bytes as one that is forgotten, or ordered to be. Nothing "
            "brings it back."
        )
    same = state.updates_from(node.node_id, update.manifest.start.release)
    rival = next(
        (u for u in same if u != update and (u.state in _COUNTING or u.update_id in together)), None
    )
    if rival is not None:
        raise refused(
            f"Update {name} was trained on the same start as update {rival.update_id[:12]} of the "
            f"same node, which is {_words(rival)}: the same experience would count twice. Requeue "
            "one of them only; first set the other one aside, or forget it."
        )
    digest = update.manifest.payload.digest_sha256
    if digest in state.collected or digest not in blobs:
        raise refused(
            f"The payload of update {name} is no longer kept (retention collected it). Restore it "
            "from a backup, or let the node train anew."
        )


def _expect_whole(updates: Sequence[UpdateRecord], blobs: Payloads) -> None:
    for update in updates:
        if not blobs.holds(update.manifest.payload.digest_sha256):
            raise refused(
                f"The payload of update {update.update_id[:12]} is still gone or damaged: "
                f"{update.reason} Restore the blob, or let the node train anew."
            )


def _words(update: UpdateRecord) -> str:
    return update.state.replace("_", " ")


def _instead(update: UpdateRecord) -> str:
    """What an operator can do about an update in this state."""
    return {
        "waiting": "It waits already.",
        "planned": "It is in a merge under way.",
        "merged": (
            "`central forget` takes it out of the releases; `central releases rollback` frees it "
            "with its release."
        ),
        "superseded": "The node's newer update took its place.",
        "set_aside": "It is set aside already.",
        "quarantined": "`central nodes release` lets its node's updates wait again.",
        "forgotten": "Nothing brings it back.",
    }[update.state]
