"""Revocation: a node is refused from now on, and nothing more of it is merged.

In: a node id. Out: one append to the journal.

Guarantees: the node's join token ends, and so do earlier tokens that readmit its name. Its key is
never enrolled again, and its name only with a token that readmits it (enrollment.py). Its updates
that no accepted release holds are set aside in the same transaction, also from a merge under way,
whose other updates wait again. Merged updates stay merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from central.errors import Reason, Refused
from central.fleet.tokens import token_revoked
from central.journal import EventKind, Journal, NewEvent, NodeRecord, State, TokenRecord
from central.journal.state.moves import REVOKED


@dataclass(frozen=True)
class Revocation:
    """What the revocation did besides."""

    token_id: str
    ended_uses: int
    """Uses that were left of the token that the node came with."""
    others: tuple[str, ...]
    """Nodes that came with the same token and are not revoked."""


def revoke_node(journal: Journal, node_id: str, by: str) -> Revocation:
    """Revoke the node for operator `by`. Idempotent; raises Refused for an unknown node."""
    with journal.read() as state:
        node = state.nodes.get(node_id)
        if node is None:
            raise unknown_node(node_id)
        token = state.tokens[node.token_id]
        others = tuple(
            other for other in token.nodes if other != node_id and not state.nodes[other].revoked
        )
        if node.revoked:
            return Revocation(token.token_id, 0, others)
        # Set aside first: a revoked node's update would not go back to waiting when a merge is
        # cancelled for another one.
        unmerged = [
            NewEvent(
                EventKind.UPDATE_SET_ASIDE, update.cohort, update.update_id, {"reason": REVOKED}
            )
            for update in state.updates_of(node_id)
            if update.state in ("waiting", "planned", "quarantined")
        ]
        left = 0 if token.revoked else token.uses - token.used
        ended = [token_revoked(token, f"its node {node_id} was revoked", by)] if left else []
        ended += [
            token_revoked(
                other, f"a node of the name that it readmits, {node_id}, was revoked later", by
            )
            for other in _readmitting(state, node)
            if other is not token
        ]
        journal.append(
            *unmerged, *ended, NewEvent(EventKind.NODE_REVOKED, node.cohort, node_id, {"by": by})
        )
        return Revocation(token.token_id, left, others)


def _readmitting(state: State, node: NodeRecord) -> list[TokenRecord]:
    """Tokens from before the revocation that would let the node's name in again."""
    return [
        token
        for token in state.tokens.values()
        if token.readmits
        and not token.revoked
        and token.used < token.uses
        and state.nodes[token.readmits].name.casefold() == node.name.casefold()
    ]


def unknown_node(node_id: str) -> Refused:
    """The refusal for an operator who names an unknown node."""
    return Refused(
        grpc.StatusCode.NOT_FOUND,
        Reason.UNKNOWN_NODE,
        f"Node {node_id!r} is not known. Expected a full node id; `central nodes` shows them.",
    )
