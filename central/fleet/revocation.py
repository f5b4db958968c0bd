"""Revocation: a node is refused from now on, and nothing more of it is merged.

In: a node id. Out: one append to the journal. Guarantees: what the node sent and no accepted release holds is set aside in
the same transaction, also from a merge under way, whose other updates wait again; merged updates stay merged.
"""

from __future__ import annotations

import grpc

from central.errors import Reason, Refused
from central.journal import EventKind, Journal, NewEvent
from central.journal.transitions import REVOKED


def revoke_node(journal: Journal, node_id: str, by: str) -> None:
    """Revoke the node; `by` is the operator's name. Idempotent; raises Refused for an unknown node."""
    with journal.read() as state:
        node = state.nodes.get(node_id)
        if node is None:
            raise unknown_node(node_id)
        if node.revoked:
            return
        # Set aside first: a revoked node's update would not go back to waiting when a merge is cancelled for another one.
        unmerged = [
            NewEvent(EventKind.UPDATE_SET_ASIDE, update.cohort, update.update_id, {"reason": REVOKED})
            for update in state.updates_of(node_id)
            if update.state in ("waiting", "planned", "quarantined")
        ]
        journal.append(*unmerged, NewEvent(EventKind.NODE_REVOKED, node.cohort, node_id, {"by": by}))


def unknown_node(node_id: str) -> Refused:
    """What an operator is told who names a node that is not there."""
    return Refused(
        grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_NODE,
        f"Node {node_id!r} is not known. Expected a full node id; `central nodes` shows them.",
    )
