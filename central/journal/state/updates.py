"""Events of updates: admitted, superseded, set aside, waiting again."""

from __future__ import annotations

from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.records import UpdateRecord
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.moves import REVOKED, cancel_plan_of, move, name_blobs
from central.journal.state.state import State, applies
from protos.manifest import UpdateManifest, sha256_hex


@applies(EventKind.UPDATE_ADMITTED)
def update_admitted(state: State, event: Event) -> None:
    expect_new(event, state.updates)
    data = event.body["manifest"].encode()
    manifest, digest = UpdateManifest.from_bytes(data), sha256_hex(data)
    node = known(event, state.nodes, manifest.node_id, "node")
    if node.cohort != event.cohort or digest != event.subject or node.revoked:
        raise conflict(
            event,
            f"node {node.node_id} is of cohort {node.cohort!r}, revoked: {node.revoked}, "
            f"manifest {digest}",
        )
    record = UpdateRecord(
        update_id=event.subject,
        manifest=manifest,
        cohort=event.cohort,
        state="quarantined" if node.quarantine else "waiting",
        reason=node.quarantine,
        admitted_at=event.at,
        admitted_sequence=event.sequence,
        admitted_hash=event.hash,
    )
    state.updates.put(record)
    name_blobs(state, [manifest.payload.digest_sha256])


@applies(EventKind.UPDATE_SUPERSEDED)
def update_superseded(state: State, event: Event) -> None:
    by = known(event, state.updates, event.body["by"], "update")
    reason = f"superseded by the node's update {by.update_id}"
    move(state, event, event.subject, "superseded", ("waiting", "quarantined"), reason)


@applies(EventKind.UPDATE_SET_ASIDE)
def update_set_aside(state: State, event: Event) -> None:
    cancel_plan_of(state, event, event.subject, event.body["reason"])
    move(state, event, event.subject, "set_aside", ("waiting", "quarantined"), event.body["reason"])
    if event.body.get("lost"):
        state.updates.put(replace(state.updates[event.subject], lost=True))


@applies(EventKind.UPDATE_REQUEUED)
def update_requeued(state: State, event: Event) -> None:
    update = known(event, state.updates, event.subject, "update")
    node = state.nodes[update.manifest.node_id]
    if node.revoked or node.quarantine:
        raise conflict(
            event, REVOKED if node.revoked else f"its node is in quarantine: {node.quarantine}"
        )
    if gone := state.collected.get(update.manifest.payload.digest_sha256):
        raise conflict(event, f"its payload was {gone.text}")
    cancel_plan_of(state, event, event.subject)
    move(state, event, event.subject, "waiting", ("waiting", "set_aside"))
