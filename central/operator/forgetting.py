"""`central forget`: an operator orders that a node's contributions, or one update, be taken out of the releases.

In: a node id or an update id. Out: the order in the journal, or what it would be. Guarantees: what no release that is served holds
is forgotten with the order itself; what the stable head holds goes with a new release, made by the cohort's loop from the journal,
so a crash resumes it; the method is one that can be carried out with the payloads that there are; a repeat finds the order.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from central.journal import EventKind, Journal, NewEvent, ReleaseRecord, State, UpdateRecord, utc_now
from central.journal.records import ForgetRecord
from central.journal.removal import can_subtract, exactness, line_of, replay_blobs, subtracted
from central.operator.contributions import Payloads, find_update, refused

Method = Literal["replay", "subtract"]


@dataclass(frozen=True)
class Proposal:
    """An order and what it means now. `in_release` is what the stable head holds of it, `unreleased` the rest."""

    order: ForgetRecord
    in_release: tuple[UpdateRecord, ...]
    unreleased: tuple[UpdateRecord, ...]
    exactness: str
    merges: int
    holders: tuple[str, ...]
    """Versions of the releases that hold any of it, oldest first."""
    composed: tuple[str, ...]
    """Cohorts that build on this one, and whose stable release is composed with one of those."""


def propose_forget(
    journal: Journal, blobs: Payloads, target: str, wished: Method | None, accept_loss: bool, by: str
) -> Proposal:
    """What an order to forget `target` would be; raises Refused. With an order for it under way, that one."""
    absent = _absent(journal, blobs, target)
    with journal.read() as state:
        return _propose(state, absent, target, wished, accept_loss, by)


def order_forget(
    journal: Journal, blobs: Payloads, target: str, wished: Method | None, accept_loss: bool, by: str
) -> Proposal:
    """Order it; returns the order as it stands then. Raises Refused, and then nothing was changed."""
    absent = _absent(journal, blobs, target)
    with journal.read() as state:
        proposal = _propose(state, absent, target, wished, accept_loss, by)
        order = proposal.order
        if order.order_id in state.forgets:
            return proposal
        body = {
            "node_id": order.node_id,
            "updates": list(order.updates),
            "method": order.method,
            "accept_loss": order.accept_loss,
            "by": by,
        }
        journal.append(NewEvent(EventKind.FORGET_ORDERED, order.cohort, order.order_id, body))
        # What the order meant when it was given: nothing of it is unreleased any more.
        return replace(proposal, order=state.forgets[order.order_id])


def describe(state: State, order: ForgetRecord) -> Proposal:
    """The order with what it means at its stable head; of one that is planned or over, what it meant for its plan."""
    head = state.releases[state.channels[(order.cohort, "stable")]]
    planned = state.plans[order.plan_id].plan if order.plan_id else None
    if planned is not None and planned.removal is not None:
        removal = planned.removal
        held = {update.update_id for update in removal.updates}
        since, merges, truncated = state.releases[removal.since], removal.merges, removal.truncated
    else:
        held = set(state.contributions(head.release_id)).intersection(order.updates)
        if held:
            line = line_of(state, head, held)
            since, merges, truncated = line.since, len(line.merges), line.truncated
        else:
            since, merges, truncated = head, 0, 0.0
    updates = [state.updates[update_id] for update_id in order.updates]
    words = (
        exactness(order.method, since.manifest.label, merges, truncated)
        if held
        else "no release in use holds any of it"
    )
    holders = state.holders(order.cohort, order.updates)
    return Proposal(
        order=order,
        in_release=tuple(update for update in updates if update.update_id in held),
        unreleased=tuple(update for update in updates if update.update_id not in held),
        exactness=words,
        merges=merges,
        holders=tuple(state.releases[release_id].manifest.label for release_id in holders),
        composed=tuple(cohort for cohort in state.builds_on if _base_id(state, cohort) in holders),
    )


def _base_id(state: State, cohort: str) -> str:
    base = state.base_of(state.releases[state.channels[(cohort, "stable")]])
    return base.release_id if base else ""


def _absent(journal: Journal, blobs: Payloads, target: str) -> frozenset[str]:
    """What a removal would read and cannot. Looked up without the journal's lock: a store may be far away, and what a merge adds
    meanwhile is there."""
    with journal.read() as state:
        _, updates = _targeted(state, target)
        head = state.releases[state.channels[(updates[0].cohort, "stable")]]
        held = set(state.contributions(head.release_id)).intersection(_ids(updates))
        line = line_of(state, head, held) if held else None
        needed = {*replay_blobs(state, line), *(u.manifest.payload.digest_sha256 for u in updates)} if line else set()
        collected = needed.intersection(state.collected)  # perhaps not deleted yet, but on the way
    return frozenset(collected.union(digest for digest in needed - collected if digest not in blobs))


def _propose(
    state: State, absent: Collection[str], target: str, wished: Method | None, accept_loss: bool, by: str
) -> Proposal:
    node_id, updates = _targeted(state, target)
    cohort = updates[0].cohort
    pending = next((o for o in state.pending_forgets(cohort) if set(o.updates).intersection(_ids(updates))), None)
    if pending is not None:
        if not set(pending.updates).issuperset(_ids(updates)):
            raise refused(
                f"Order {pending.order_id[:8]} of {pending.by} is forgetting a part of this already. Wait until it is done "
                "(`central forget --orders`), then order the rest."
            )
        if accept_loss and not pending.accept_loss:
            raise refused(
                f"Order {pending.order_id[:8]} of {pending.by} is under way and leaves the decision to the gate. Wait for its verdict "
                "(`central forget --orders`); then order it again with --accept-loss if skill would be lost."
            )
        return describe(state, pending)
    head = state.releases[state.channels[(cohort, "stable")]]
    method = _method(state, absent, head, updates, wished)
    order = ForgetRecord(uuid.uuid4().hex, cohort, node_id, tuple(_ids(updates)), method, accept_loss, by, utc_now())
    return describe(state, order)


def _targeted(state: State, target: str) -> tuple[str, list[UpdateRecord]]:
    if target in state.nodes:
        updates = [update for update in state.updates_of(target) if update.state != "forgotten"]
        if not updates:
            raise refused(
                f"Node {target} has no update here that is not forgotten already; there is nothing to forget."
            )
        return target, updates
    update = find_update(state, target)
    if update.state == "forgotten":
        raise refused(f"Update {update.update_id[:12]} is forgotten already: {update.reason}.")
    return "", [update]


def _method(
    state: State, absent: Collection[str], head: ReleaseRecord, updates: Sequence[UpdateRecord], wished: Method | None
) -> Method:
    held = set(state.contributions(head.release_id)).intersection(_ids(updates))
    if not held:
        return wished or "replay"
    line = line_of(state, head, held)
    if any(record.plan.resolve for record in line.merges):
        raise refused(
            f"It cannot be taken out: a merge since {line.since.manifest.label} solved over absolute solutions (CENTRAL_MERGE__RESOLVE), "
            f"and the releases that these start from hold it too. Return to {line.since.manifest.label} with `central releases rollback`."
        )
    missing = [digest for digest in replay_blobs(state, line) if digest in absent]
    if not missing and wished != "subtract":
        return "replay"
    if wished == "replay":
        raise refused(
            f"The {len(line.merges)} merges since {line.since.manifest.label} cannot be done again: {len(missing)} payloads are no "
            "longer kept. Restore them from a backup, or use --method subtract."
        )
    if not can_subtract(line, held):
        raise refused(
            "It cannot be subtracted: a merge that held it was not a plain sum (product-mean). "
            + (
                "Use --method replay."
                if not missing
                else f"A replay needs {len(missing)} payloads that are no longer kept; restore them from a backup."
            )
        )
    gone = [planned.update_id[:12] for planned in subtracted(line, held) if planned.payload in absent]
    if gone:
        raise refused(
            f"The payloads of {', '.join(gone)} are no longer kept, and neither is what a replay needs. Restore them from a "
            f"backup, or return to {line.since.manifest.label} with `central releases rollback`."
        )
    return "subtract"


def _ids(updates: Sequence[UpdateRecord]) -> list[str]:
    return [update.update_id for update in updates]
