"""Where releases serve: one event whenever a node says that it serves another release.

In: what nodes say of themselves. Out: journal events. Guarantees: a repeat adds nothing. A node
that changes its word all the time adds one event per PAUSE_S at most. Its last word is recorded
with its next report after that.
"""

from __future__ import annotations

from datetime import datetime

from central.journal import EventKind, Journal, NewEvent

PAUSE_S = 10.0


def record_served(journal: Journal, node_id: str, release_id: str, now: str | None = None) -> None:
    """Record that the node serves the release, unless that is unknown or another cohort's."""
    with journal.read() as state:
        node, release, before = (
            state.nodes[node_id],
            state.releases.get(release_id),
            state.serving.get(node_id),
        )
        if release is None or release.cohort != node.cohort or node.revoked:
            return
        if before is not None:
            passed = datetime.fromisoformat(now or journal.clock()) - datetime.fromisoformat(
                before.since
            )
            if before.release_id == release_id or passed.total_seconds() < PAUSE_S:
                return
        journal.append(
            NewEvent(EventKind.RELEASE_SERVED, node.cohort, release_id, {"node_id": node_id})
        )
