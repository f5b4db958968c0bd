"""Revocation: a node is refused from now on, nothing more of it is merged, and nobody else comes in
with its token.

In: a node id. Out: one append to the journal. Guarantees: what is left of the node's join token
ends with it, and so do tokens that were made earlier to readmit its name; its key is never enrolled again, and its name only with a token that readmits it
(enrollment.py); what the node sent and no accepted release holds is set aside in the same
transaction, also from a merge under way, whose other updates wait again; merged updates stay
merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from central.errors import Reason, Refused
from central.fleet.tokens import token_revoked
from central.journal import EventKind, Journal, NewEvent, NodeRecord, State, TokenRecord
from central.journal.transitions import REVOKED


@dataclass(frozen=True)
class Revocation:
    """What it did besides."""

    token_id: str
    ended_uses: int
    """Of the token that the node came with."""
    others: tuple[str, ...]
    """Nodes that came with the same token and are not revoked."""


def revoke_node(journal: Journal, node_id: str, by: str) -> Revocation:
    """Revoke the node; `by` is the operator's name. Idempotent; raises Refused for an unknown node."""
    with journal.read() as state:
        node = state.nodes.get(node_id)
        if node is None:
            raise unknown_node(node_id)
        token = state.tokens[node.token_id]
        others = tuple(other for other in token.nodes if other != node_id and not state.nodes[other].revoked)
        if node.revoked:
            return Revocation(token.token_id, 0, others)
        # Set aside first: a revoked node's update would not go back to waiting when a merge is cancelled for another one.
        unmerged = [
            NewEvent(EventKind.UPDATE_SET_ASIDE, update.cohort, update.update_id, {"reason": REVOKED})
            for update in state.updates_of(node_id)
            if update.state in ("waiting", "planned", "quarantined")
        ]
        left = 0 if token.revoked else token.uses - token.used
        ended = [token_revoked(token, f"its node {node_id} was revoked", by)] if left else []
        ended += [
            token_revoked(other, f"a node of the name that it readmits, {node_id}, was revoked later", by)
            for other in _readmitting(state, node)
            if other is not token
        ]
        journal.append(*unmerged, *ended, NewEvent(EventKind.NODE_REVOKED, node.cohort, node_id, {"by": by}))
        return Revocation(token.token_id, left, others)


def _readmitting(state: State, node: NodeRecord) -> list[TokenRecord]:
    """Tokens that would let the node's name in again, though they were made before its revocation."""
    return [
        token
        for token in state.tokens.values()
        if token.readmits
        and not token.revoked
        and token.used < token.uses
        and state.nodes[token.readmits].name.casefold() == node.name.casefold()
    ]


def unknown_node(node_id: str) -> Refused:
    """What an operator is told who names a node that is not there."""
    return Refused(
        grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_NODE,
        f"Node {node_id!r} is not known. Expected a full node id; `central nodes` shows them.",
    )
