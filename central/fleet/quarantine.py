"""Quarantine: nothing more is merged of a node whose updates were blamed again and again.

The node goes on serving and learning. In: verdicts, and orders of operators. Out: events.

Guarantees: what the node sends is admitted and kept aside. When an operator releases the node, all
of it waits again. One verdict alone never puts a node in quarantine, unless the settings say so.
"""

from __future__ import annotations

import grpc

from central.errors import Reason, Refused
from central.fleet.revocation import unknown_node
from central.journal import EventKind, Journal, NewEvent, NodeRecord, State, UpdateRecord
from central.settings import QuarantineSettings

MAX_REASON = 500


def quarantine_events(
    state: State, blamed: list[str], settings: QuarantineSettings
) -> list[NewEvent]:
    """The quarantines that follow when a verdict blames `blamed`; record them with the verdict."""
    nodes = {
        node.node_id: node
        for u in blamed
        if (node := state.nodes[state.updates[u].manifest.node_id])
    }
    return [
        NewEvent(
            EventKind.NODE_QUARANTINED,
            node.cohort,
            node.node_id,
            {"reason": _why(node, settings), "by": "gate"},
        )
        for node in nodes.values()
        if settings.isolated_updates and not node.revoked and not node.quarantine
        if _blamed(node, settings) >= settings.isolated_updates
    ]


def quarantine_node(journal: Journal, node_id: str, reason: str, by: str) -> list[UpdateRecord]:
    """Put the node in quarantine; returns its updates that are kept aside. Raises Refused.

    A repeat changes nothing.
    """
    if not reason.strip() or len(reason) > MAX_REASON:
        raise _refused(
            f"The reason has {len(reason.strip())} characters. Expected 1 to {MAX_REASON}."
        )
    with journal.read() as state:
        node = _known(state, node_id)
        if node.revoked:
            raise _refused(
                f"Node {node_id} is revoked: nothing of it is merged anyway. Quarantine is for "
                "enrolled nodes."
            )
        if not node.quarantine:
            body = {"reason": reason.strip(), "by": by}
            journal.append(NewEvent(EventKind.NODE_QUARANTINED, node.cohort, node_id, body))
        return [update for update in state.updates_of(node_id) if update.state == "quarantined"]


def release_node(journal: Journal, node_id: str, by: str) -> list[UpdateRecord]:
    """Release the node from quarantine; returns its updates, which wait again.

    Raises Refused when it is not in quarantine.
    """
    with journal.read() as state:
        node = _known(state, node_id)
        if node.revoked or not node.quarantine:
            what = "revoked" if node.revoked else "not in quarantine"
            raise _refused(
                f"Node {node_id} is {what}; there is nothing to release. `central nodes` shows who "
                "is."
            )
        kept = [
            update.update_id
            for update in state.updates_of(node_id)
            if update.state == "quarantined"
        ]
        journal.append(NewEvent(EventKind.NODE_RELEASED, node.cohort, node_id, {"by": by}))
        return [state.updates[update_id] for update_id in kept]


def _blamed(node: NodeRecord, settings: QuarantineSettings) -> int:
    """How many of the node's last verdicts blame it, with the one about to be recorded."""
    return sum((*node.judged, True)[-settings.window :])


def _why(node: NodeRecord, settings: QuarantineSettings) -> str:
    judged = min(len(node.judged) + 1, settings.window)
    return f"the gate rejected {_blamed(node, settings)} of its last {judged} updates, each alone"


def _known(state: State, node_id: str) -> NodeRecord:
    if node_id not in state.nodes:
        raise unknown_node(node_id)
    return state.nodes[node_id]


def _refused(message: str) -> Refused:
    return Refused(grpc.StatusCode.FAILED_PRECONDITION, Reason.BAD_ARGUMENT, message)
