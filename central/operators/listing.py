"""Records of the state as messages of the operator service.

In: records. Out: messages; nothing is looked up elsewhere and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

from central.fleet.presence import NodePresence
from central.fleet.tokens import TokenState, token_state
from central.intake.service import update_state
from central.journal import (
    EvaluationRecord,
    Event,
    NodeRecord,
    ReleaseRecord,
    State,
    TokenRecord,
    UpdateRecord,
)
from central.journal.records import ForgetStateName, ReleaseStateName
from central.merging.progress import under_way
from central.operators.forgetting import Proposal
from central.operators.waiting import waits_for
from central.releases.canary import Soak, find_soak
from central.settings import ChannelSettings
from protos.manifest import canonical_json
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2

NO_SETTINGS = ChannelSettings()
_RELEASE_STATES: dict[ReleaseStateName, operators_pb2.ReleaseState] = {
    "candidate": operators_pb2.RELEASE_STATE_CANDIDATE,
    "accepted": operators_pb2.RELEASE_STATE_ACCEPTED,
    "rejected": operators_pb2.RELEASE_STATE_REJECTED,
    "abandoned": operators_pb2.RELEASE_STATE_ABANDONED,
    "withdrawn": operators_pb2.RELEASE_STATE_WITHDRAWN,
}
_FORGET_STATES: dict[ForgetStateName, operators_pb2.ForgetState] = {
    "ordered": operators_pb2.FORGET_STATE_ORDERED,
    "planned": operators_pb2.FORGET_STATE_PLANNED,
    "done": operators_pb2.FORGET_STATE_DONE,
    "rejected": operators_pb2.FORGET_STATE_REJECTED,
    "failed": operators_pb2.FORGET_STATE_FAILED,
}
_TOKEN_STATES: dict[TokenState, operators_pb2.TokenState] = {
    "usable": operators_pb2.TOKEN_STATE_USABLE,
    "used up": operators_pb2.TOKEN_STATE_USED_UP,
    "expired": operators_pb2.TOKEN_STATE_EXPIRED,
    "revoked": operators_pb2.TOKEN_STATE_REVOKED,
}


def node_message(node: NodeRecord, presence: NodePresence) -> operators_pb2.Node:
    return operators_pb2.Node(
        node_id=node.node_id,
        name=node.name,
        cohort=node.cohort,
        revoked=node.revoked,
        connected=presence.connected and not node.revoked,
        last_seen=presence.last_seen,
        status=presence.status,
        quarantine=node.quarantine,
        silent_since=node.silent_since,
    )


def token_message(token: TokenRecord, now: datetime) -> operators_pb2.Token:
    return operators_pb2.Token(
        token_id=token.token_id,
        cohort=token.cohort,
        state=_TOKEN_STATES[token_state(token, now)],
        uses=token.uses,
        used=token.used,
        created_at=token.created_at,
        expires_at=token.expires_at,
        node_ids=token.nodes,
        readmits=token.readmits,
        reason=token.revoked,
    )


def update_message(update: UpdateRecord) -> operators_pb2.Update:
    manifest = update.manifest
    return operators_pb2.Update(
        update_id=update.update_id,
        node_id=manifest.node_id,
        cohort=update.cohort,
        sequence=manifest.sequence,
        state=update_state(update),
        start_release_id=manifest.start.release,
        rank=manifest.rank,
        size_bytes=manifest.payload.size_bytes,
        admitted_at=update.admitted_at,
        release_id=update.release_id or "",
        reason=update.reason,
    )


def release_message(
    state: State,
    release: ReleaseRecord,
    channels: ChannelSettings = NO_SETTINGS,
    continual: operators_pb2.ContinualFigures | None = None,
) -> operators_pb2.Release:
    """`channels` says when a canary becomes stable."""
    manifest = release.manifest
    plan = state.plans[release.plan_id].plan if release.plan_id else None
    offers = state.offers_of(release.release_id)
    reports = [report for offer in offers for report in offer.reports.values()]
    return operators_pb2.Release(
        release_id=release.release_id,
        version=release.label,
        cohort=release.cohort,
        parent_id=manifest.parent or "",
        state=release_state(release),
        channels=sorted(
            channel
            for (cohort, channel), head in state.channels.items()
            if (cohort, head) == (release.cohort, release.release_id)
        ),
        created_at=manifest.created_at,
        rank=manifest.rank,
        size_bytes=manifest.payload.size_bytes,
        truncation_error=manifest.truncation_error,
        update_weights={update.update_id: update.weight for update in plan.updates} if plan else {},
        evaluations=[
            operators_pb2.NodeVerdict(
                node_id=report.node_id,
                results=[releases_pb2.EnvironmentResult(**result) for result in report.results],
                abstain_reason="it came after the verdict"
                if report.late
                else report.abstain_reason,
            )
            for report in reports
        ]
        + [
            operators_pb2.NodeVerdict(node_id=node_id, abstain_reason=why)
            for node_id, why in _unheard(state, release, offers)
        ],
        verdict=release.verdict.text if release.verdict else "",
        soak=_soak_message(
            find_soak(state, release.cohort, channels.policy(release.cohort)), release
        ),
        builds_on_id=manifest.composition.builds_on if manifest.composition else "",
        continual=continual,
    )


def merges_under_way(cohort: str) -> list[operators_pb2.MergeUnderWay]:
    """The merges that this process computes now, of one cohort or (empty) of all."""
    return [
        operators_pb2.MergeUnderWay(cohort=merge.cohort, progress=str(merge))
        for merge in under_way()
        if cohort in ("", merge.cohort)
    ]


def _unheard(
    state: State, release: ReleaseRecord, offers: Sequence[EvaluationRecord]
) -> Iterator[tuple[str, str]]:
    """Nodes that were asked and did not report, and why the verdict did without them."""
    if release.verdict is None:
        return
    asked = {node_id for offer in offers for node_id in offer.nodes}
    for node_id in sorted(asked.difference(*(offer.reports for offer in offers))):
        since = state.nodes[node_id].silent_since
        yield (
            node_id,
            "no "
            f"report{f', silent since {since}' if since and since <= release.verdict.at else ''}",
        )


def release_state(release: ReleaseRecord) -> operators_pb2.ReleaseState:
    return _RELEASE_STATES[release.state]


def _soak_message(soak: Soak | None, release: ReleaseRecord) -> operators_pb2.Soak | None:
    if soak is None or soak.release.release_id != release.release_id:
        return None
    return operators_pb2.Soak(
        since=soak.since,
        serving=soak.serving,
        troubled=soak.troubled,
        promotes_at=soak.promotes_at or "",
        waits_for=soak.waits_for,
    )


def forget_message(state: State, proposal: Proposal, failure: str) -> operators_pb2.ForgetOrder:
    """`failure`: why the cohort's loop does not go on."""
    order = proposal.order
    ordered = order.order_id in state.forgets
    plan = state.plans[order.plan_id] if order.plan_id else None
    made = state.releases[plan.candidate] if plan and plan.candidate else None
    verdict = made.verdict.text if made and made.verdict else ""
    return operators_pb2.ForgetOrder(
        order_id=order.order_id if ordered else "",
        cohort=order.cohort,
        node_id=order.node_id,
        state=_FORGET_STATES[order.state] if ordered else operators_pb2.FORGET_STATE_PROPOSED,
        in_release=[update_message(update) for update in proposal.in_release],
        unreleased=[update_message(update) for update in proposal.unreleased],
        exactness=proposal.exactness,
        merges=proposal.merges,
        candidate=made.manifest.label if made else "",
        verdict=order.reason or verdict,
        accept_loss=order.accept_loss,
        by=order.by,
        at=order.at,
        holders=proposal.holders,
        composed_cohorts=proposal.composed,
        waits_for=waits_for(state, order, failure) if ordered else "",
    )


def event_message(event: Event) -> operators_pb2.JournalEvent:
    return operators_pb2.JournalEvent(
        sequence=event.sequence,
        at=event.at,
        kind=event.kind.value,
        cohort=event.cohort,
        subject=event.subject,
        body=canonical_json(dict(event.body)).decode(),
        hash=event.hash,
    )
