"""`central forget`: an operator orders that a node's updates, or one update, be forgotten.

In: a node id or an update id. Out: the order in the journal, or what it would be.

Guarantees: updates that no served release holds are forgotten with the order itself. Updates that
the stable head holds go with a new release. The cohort's loop makes it from the journal, so a crash
resumes it. An order is given only when the payloads that its replay reads are there. A repeat finds
the order. An order under way can be taken back, without the gate.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from central.journal import (
    EventKind,
    Journal,
    NewEvent,
    ReleaseRecord,
    State,
    UpdateRecord,
)
from central.journal.records import ForgetRecord
from central.journal.removal import exactness, line_of, replay_blobs
from central.operators.contributions import MIN_PREFIX_DIGITS, Payloads, find_update, refused


@dataclass(frozen=True)
class Proposal:
    """An order and what it means now: the stable head holds `in_release`, and not `unreleased`."""

    order: ForgetRecord
    in_release: tuple[UpdateRecord, ...]
    unreleased: tuple[UpdateRecord, ...]
    exactness: str
    merges: int
    holders: tuple[str, ...]
    """Versions of the releases that hold any of it, oldest first."""
    composed: tuple[str, ...]
    """Cohorts that build on this one and whose stable release is composed with one of `holders`."""


def propose_forget(
    journal: Journal, blobs: Payloads, target: str, accept_loss: bool, by: str
) -> Proposal:
    """The order under way for `target`, or what an order would be; raises Refused."""
    absent = _absent(journal, blobs, target)
    with journal.read() as state:
        return _propose(state, absent, target, accept_loss, by, journal.clock())


def order_forget(
    journal: Journal, blobs: Payloads, target: str, accept_loss: bool, by: str
) -> Proposal:
    """Order it; returns the order as recorded. Raises Refused and then changes nothing."""
    absent = _absent(journal, blobs, target)
    with journal.read() as state:
        proposal = _propose(state, absent, target, accept_loss, by, journal.clock())
        order = proposal.order
        if order.order_id in state.forgets:
            return proposal
        body = {
            "node_id": order.node_id,
            "updates": list(order.updates),
            "accept_loss": order.accept_loss,
            "by": by,
        }
        journal.append(NewEvent(EventKind.FORGET_ORDERED, order.cohort, order.order_id, body))
        # What the order meant when it was given: nothing of it is unreleased any more.
        return replace(proposal, order=state.forgets[order.order_id])


def cancel_forget(journal: Journal, target: str, by: str) -> Proposal:
    """Take back the order under way for this node, update or order id; raises Refused."""
    with journal.read() as state:
        order = _under_way(state, target)
        if (made := _accepted(state, order)) is not None:
            raise refused(
                f"The release without it, {made.manifest.label}, is accepted and soaks on canary. "
                f"Take that back instead: `central releases rollback --cohort {order.cohort} "
                "--channel canary --updates requeue` ends the order too."
            )
        body = {"reason": f"taken back by {by}", "by": by}
        journal.append(NewEvent(EventKind.FORGET_FAILED, order.cohort, order.order_id, body))
        return describe(state, state.forgets[order.order_id])


def describe(state: State, order: ForgetRecord) -> Proposal:
    """The order with what it means at its stable head.

    Of an order that is planned or over: what it meant for its plan.
    """
    head = state.releases[state.channels[(order.cohort, "stable")]]
    planned = state.plans[order.plan_id].plan if order.plan_id else None
    if planned is not None and planned.removal is not None:
        removal = planned.removal
        held = {update.update_id for update in removal.updates}
        since, merges = state.releases[removal.since], removal.merges
    else:
        held = set(state.contributions(head.release_id)).intersection(order.updates)
        if held:
            line = line_of(state, head, held)
            since, merges = line.since, len(line.merges)
        else:
            since, merges = head, 0
    updates = [state.updates[update_id] for update_id in order.updates]
    words = exactness(since.manifest.label, merges) if held else "no release in use holds any of it"
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
    """The blobs that a removal would read and cannot.

    They are looked up without the journal's lock, because a store may be far away. What a merge
    adds meanwhile is there.
    """
    with journal.read() as state:
        _, updates = _targeted(state, target)
        head = state.releases[state.channels[(updates[0].cohort, "stable")]]
        held = set(state.contributions(head.release_id)).intersection(_ids(updates))
        line = line_of(state, head, held) if held else None
        needed = set(replay_blobs(state, line)) if line else set()
        collected = needed.intersection(state.collected)  # perhaps not deleted yet, but on the way
    return frozenset(
        collected.union(digest for digest in needed - collected if digest not in blobs)
    )


def _propose(
    state: State, absent: Collection[str], target: str, accept_loss: bool, by: str, now: str
) -> Proposal:
    node_id, updates = _targeted(state, target)
    cohort = updates[0].cohort
    pending = [
        order
        for order in state.pending_forgets(cohort)
        if set(order.updates).intersection(_ids(updates))
    ]
    if pending:
        first = pending[0]
        if not set(first.updates).issuperset(_ids(updates)):
            raise refused(
                f"Order {first.order_id[:8]} of {first.by} is forgetting a part of this already. "
                "Wait until it is done (`central forget --orders`), then order the rest."
            )
        if accept_loss and not first.accept_loss and _accepted(state, first) is None:
            raise refused(
                f"Order {first.order_id[:8]} of {first.by} is under way and leaves the decision to "
                f"the gate. Take it back (`central forget {first.order_id[:8]} --cancel`), then "
                "order again with --accept-loss."
            )
        return describe(state, first)
    head = state.releases[state.channels[(cohort, "stable")]]
    _check_replay(state, absent, head, updates)
    order = ForgetRecord(
        uuid.uuid4().hex, cohort, node_id, tuple(_ids(updates)), accept_loss, by, now
    )
    return describe(state, order)


def _accepted(state: State, order: ForgetRecord) -> ReleaseRecord | None:
    """The order's release once it is accepted; it only has to become stable then."""
    candidate = state.plans[order.plan_id].candidate if order.plan_id else None
    made = state.releases[candidate] if candidate else None
    return made if made is not None and made.state == "accepted" else None


def _under_way(state: State, target: str) -> ForgetRecord:
    orders = [order for cohort in state.cohorts() for order in state.pending_forgets(cohort)]
    known_by = {order.order_id: (order.order_id, *order.updates) for order in orders}
    found = [
        order
        for order in orders
        if target == order.node_id
        or (
            len(target) >= MIN_PREFIX_DIGITS
            and any(name.startswith(target) for name in known_by[order.order_id])
        )
    ]
    if len(found) != 1:
        raise refused(
            f"{len(found) or 'No'} orders to forget that are under way are for {target[:80]!r}. "
            f"Expected one: name it by its own id, or its first {MIN_PREFIX_DIGITS} or more "
            "digits; `central forget --orders` lists them."
        )
    return found[0]


def _targeted(state: State, target: str) -> tuple[str, list[UpdateRecord]]:
    if target in state.nodes:
        updates = [update for update in state.updates_of(target) if update.state != "forgotten"]
        if not updates:
            raise refused(
                f"Node {target} has no update here that is not forgotten already; there is nothing "
                "to forget."
            )
        return target, updates
    update = find_update(state, target)
    if update.state == "forgotten":
        raise refused(f"Update {update.update_id[:12]} is forgotten already: {update.reason}.")
    return "", [update]


def _check_replay(
    state: State, absent: Collection[str], head: ReleaseRecord, updates: Sequence[UpdateRecord]
) -> None:
    """Raises Refused when the head holds any of the updates and a replay lacks a payload."""
    held = set(state.contributions(head.release_id)).intersection(_ids(updates))
    if not held:
        return
    line = line_of(state, head, held)
    missing = [digest for digest in replay_blobs(state, line) if digest in absent]
    if missing:
        raise refused(
            f"The {len(line.merges)} merges since {line.since.manifest.label} cannot be done "
            f"again: {len(missing)} payloads are no longer kept. Restore them from a backup, or "
            f"return to {line.since.manifest.label} with `central releases rollback`."
        )


def _ids(updates: Sequence[UpdateRecord]) -> list[str]:
    return [update.update_id for update in updates]
