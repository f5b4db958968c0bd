"""Which blobs may go: pure.

In: the journal's state, the time, the policy. Out: digests with the reason of each. Guarantee:
nothing that `needed_blobs` has, and no blob that any record names which is not old enough to go.
Bytes that several records share go when all of them allow it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from central.journal import ReleaseRecord, State, UpdateRecord
from central.journal.payloads import needed_blobs, release_blobs, update_blobs
from central.settings import RetentionSettings


@dataclass(frozen=True)
class Collectable:
    """One blob; `size_bytes` is 0 where the journal does not say."""

    digest: str
    size_bytes: int
    reason: str


def superseded(state: State, node_id: str | None = None) -> list[Collectable]:
    """Payloads of superseded updates, of one node or (None) of all.

    They never merge, so they may be collected however new they are: `collectable` without its days.
    """
    updates = state.updates.values() if node_id is None else state.updates_of(node_id)
    found = {
        u.manifest.payload.digest_sha256
        for u in updates
        if u.state == "superseded" and state.updates.takes_of_quota(u)
    }
    if not found:
        return []
    at_once = RetentionSettings(superseded_days=0, set_aside_days=math.inf, rejected_days=math.inf)
    # The days are 0 or without end, so the time decides nothing.
    return [blob for blob in collectable(state, datetime.max, at_once) if blob.digest in found]


def collectable(state: State, now: datetime, policy: RetentionSettings) -> list[Collectable]:
    """What may be collected at `now`, in the order of the journal."""
    protected = needed_blobs(state) | state.collected.keys()
    found: dict[str, Collectable] = {}
    for blobs, reason in _subjects(state, now, policy):
        for digest, size_bytes in blobs.items():
            if reason is None:
                protected.add(digest)
            else:
                found.setdefault(digest, Collectable(digest, size_bytes, reason))
    return [blob for digest, blob in found.items() if digest not in protected]


def _subjects(
    state: State, now: datetime, policy: RetentionSettings
) -> Iterator[tuple[Mapping[str, int], str | None]]:
    """The blobs of each record, and why they may go; None: they must stay."""
    for update in state.updates.values():
        yield update_blobs(update), _update_reason(update, now, policy)
    for release in state.releases.values():
        yield release_blobs(release), _release_reason(release, now, policy)


def _update_reason(update: UpdateRecord, now: datetime, policy: RetentionSettings) -> str | None:
    days = {
        "superseded": policy.superseded_days,
        "set_aside": policy.set_aside_days,
        "forgotten": 0.0,
    }.get(update.state)
    if days is None or not _is_older(update.since or update.admitted_at, now, days):
        return None
    word = update.state.replace("_", " ")
    return (
        f"update {update.update_id[:12]} of node {update.manifest.node_id} is {word}: "
        f"{update.reason}"
    )


def _release_reason(release: ReleaseRecord, now: datetime, policy: RetentionSettings) -> str | None:
    days = {
        "rejected": policy.rejected_days,
        "abandoned": policy.rejected_days,
        "withdrawn": 0.0,
    }.get(release.state)
    at = release.verdict.at if release.verdict else release.manifest.created_at
    if days is None or not _is_older(at, now, days):
        return None
    text = f": {release.verdict.text}" if release.verdict and release.state == "rejected" else ""
    return f"{release.manifest.label} of cohort {release.cohort} is {release.state}{text}"


def _is_older(at: str, now: datetime, days: float) -> bool:
    return days == 0 or (
        math.isfinite(days) and now - datetime.fromisoformat(at) >= timedelta(days=days)
    )
