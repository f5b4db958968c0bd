"""Events of nodes: enrolled, revoked, in and out of quarantine, silent, serving another release."""

from __future__ import annotations

from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.records import NodeRecord, ServedPeriod
from central.journal.state.expect import conflict, expect_member, expect_new, known
from central.journal.state.moves import cancel_plan_of, move
from central.journal.state.state import State, applies


@applies(EventKind.NODE_ENROLLED)
def node_enrolled(state: State, event: Event) -> None:
    expect_new(event, state.nodes)
    body = event.body
    token = known(event, state.tokens, body["token_id"], "token")
    if token.cohort != event.cohort or token.used >= token.uses or token.revoked:
        raise conflict(
            event,
            f"token {token.token_id} of cohort {token.cohort!r} was used {token.used} of "
            f"{token.uses} times, revoked: {token.revoked!r}",
        )
    state.tokens.put(replace(token, nodes=(*token.nodes, event.subject)))
    state.nodes.put(
        NodeRecord(
            node_id=event.subject,
            name=body["name"],
            cohort=event.cohort,
            token_id=token.token_id,
            public_key_pem=body["public_key_pem"],
            base=body["base"],
            certificate_sha256=body["certificate_sha256"],
            enrolled_at=event.at,
        ),
    )


@applies(EventKind.NODE_REVOKED)
def node_revoked(state: State, event: Event) -> None:
    node = known(event, state.nodes, event.subject, "node")
    state.nodes.put(replace(node, revoked=True))


@applies(EventKind.NODE_QUARANTINED)
def node_quarantined(state: State, event: Event) -> None:
    node = expect_member(state, event)
    if node.revoked or node.quarantine or not event.body["reason"]:
        raise conflict(event, f"revoked: {node.revoked}, in quarantine: {node.quarantine!r}")
    # The node first: a plan that is cancelled gives its updates back to where they may be.
    state.nodes.put(replace(node, quarantine=event.body["reason"]))
    for update in state.updates_of(node.node_id):
        cancel_plan_of(state, event, update.update_id)
        if state.updates[update.update_id].state == "waiting":
            move(state, event, update.update_id, "quarantined", ("waiting",), event.body["reason"])


@applies(EventKind.NODE_RELEASED)
def node_released(state: State, event: Event) -> None:
    node = expect_member(state, event)
    if not node.quarantine:
        raise conflict(event, "it is not in quarantine")
    state.nodes.put(replace(node, quarantine="", judged=()))
    for update in state.updates_of(node.node_id):
        if update.state == "quarantined":
            move(state, event, update.update_id, "waiting", ("quarantined",))


@applies(EventKind.NODE_SILENT)
def node_silent(state: State, event: Event) -> None:
    node = expect_member(state, event)
    offer = known(event, state.evaluations, event.body["offer_id"], "evaluation")
    report = offer.reports.get(node.node_id)
    if (
        node.silent_since
        or node.node_id not in offer.nodes
        or (report is not None and report.results)
    ):
        raise conflict(
            event, f"it is silent since {node.silent_since!r}, was not asked, or gave a result"
        )
    state.nodes.put(replace(node, silent_since=event.at))


@applies(EventKind.RELEASE_SERVED)
def release_served(state: State, event: Event) -> None:
    release = known(event, state.releases, event.subject, "release")
    node = known(event, state.nodes, event.body["node_id"], "node")
    if (release.cohort, node.cohort) != (event.cohort, event.cohort):
        raise conflict(event, f"release of {release.cohort!r}, node of {node.cohort!r}")
    state.serving.begin(ServedPeriod(node.node_id, release.release_id, event.at))
