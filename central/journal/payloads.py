"""Which blobs the journal's records name, and which of them somebody still needs.

In: the state. Out: digests with sizes. Guarantee: `needed_blobs` has every blob that is read when a
release that can be served or built on is rebuilt with all its line, and every blob that a merge yet
to come may read. When in doubt it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

from central.journal.plan import MergePlan
from central.journal.records import ReleaseRecord, UpdateRecord
from central.journal.removal import line_of
from central.journal.state import State

UNKNOWN_SIZE = 0
"""The journal does not say how large a strategy's state is."""
_LIVE = ("waiting", "planned", "merged", "quarantined")


def update_blobs(update: UpdateRecord) -> dict[str, int]:
    """Size in bytes by digest of what one update's events name."""
    payload = update.manifest.payload
    return {payload.digest_sha256: payload.size_bytes}


def release_blobs(release: ReleaseRecord) -> dict[str, int]:
    """Size in bytes by digest of one release's blobs.

    They are what it serves, its own product and its strategy's state.
    """
    payloads = (release.manifest.payload, release.manifest.own_payload)
    found = {payload.digest_sha256: payload.size_bytes for payload in payloads}
    return found if release.server_state is None else found | {release.server_state: UNKNOWN_SIZE}


def stored_blobs(state: State) -> dict[str, int]:
    """Size in bytes by digest of every blob that must be in the store: named, and not collected."""
    found: dict[str, int] = {}
    for update in state.updates.values():
        found |= update_blobs(update)
    for release in state.releases.values():
        found |= release_blobs(release)
    return {digest: size for digest, size in found.items() if digest not in state.collected}


def needed_blobs(state: State) -> set[str]:
    """Digests that must not be collected."""
    releases, updates = set(_reachable(state)), set[str]()
    plans = [
        state.plans[state.releases[r].plan_id or ""].plan
        for r in releases
        if state.releases[r].plan_id
    ]
    plans += [record.plan for record in state.plans.values() if not record.decided]
    for plan in plans:
        parent = (
            plan.parent if plan.removal is None else None
        )  # a replay begins at a release before its parent
        releases |= {release for release in (parent, plan.builds_on) if release is not None}
        updates |= {planned.update_id for planned in plan.updates}
        if plan.removal is not None:
            _add_removal(state, plan, releases, updates)
    updates |= {update.update_id for update in state.updates.values() if update.state in _LIVE}
    releases |= set(_served(state))
    found: set[str] = set()
    for update_id in updates:
        found.update(update_blobs(state.updates[update_id]))
    for release_id in releases & state.releases.keys():
        found.update(release_blobs(state.releases[release_id]))
    return found


def _reachable(state: State) -> Iterator[str]:
    """Releases that can be served or built on."""
    yield from state.channels.values()
    yield from (
        r.release_id for r in state.releases.values() if r.state in ("candidate", "accepted")
    )


def _served(state: State) -> Iterator[str]:
    """Releases that were ever served and are not withdrawn.

    Nodes that were away still send updates that start from them.
    """
    for changes in state.channel_changes.values():
        served = (change.release_id for change in changes if change.release_id is not None)
        yield from (release for release in served if state.releases[release].state != "withdrawn")


def _add_removal(state: State, plan: MergePlan, releases: set[str], updates: set[str]) -> None:
    """A removal reads every merge since then, without what it takes out."""
    removal = plan.removal
    assert removal is not None
    taken = {planned.update_id for planned in removal.updates}
    line = line_of(state, state.releases[plan.parent], taken)
    releases.add(line.since.release_id)
    for record in line.merges:
        updates |= {planned.update_id for planned in record.plan.updates} - line.without
