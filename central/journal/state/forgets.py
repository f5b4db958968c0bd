"""Events of orders to forget: ordered, failed; and what forgetting does to releases.

Guarantees: an update is never forgotten while the stable head holds it. From then on every release
that holds it is withdrawn. What such a release held of others waits again, unless the stable head
holds it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from central.journal.events import Event, EventKind
from central.journal.plan import MergePlan
from central.journal.records import ForgetRecord, PlanRecord, UpdateStateName, VerdictRecord
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.moves import (
    cancel,
    cancel_built_on,
    cancel_plan_of,
    is_merged_in,
    move,
    point,
    release_updates,
)
from central.journal.state.state import State, applies

_FORGETTABLE: tuple[UpdateStateName, ...] = (
    "waiting",
    "planned",
    "merged",
    "superseded",
    "set_aside",
    "quarantined",
)


@applies(EventKind.FORGET_ORDERED)
def forget_ordered(state: State, event: Event) -> None:
    expect_new(event, state.forgets)
    body = event.body
    pending = {update for order in state.pending_forgets(event.cohort) for update in order.updates}
    for update_id in body["updates"]:
        update = known(event, state.updates, update_id, "update")
        if update.cohort != event.cohort or update.state == "forgotten" or update_id in pending:
            raise conflict(
                event,
                f"update {update_id} of cohort {update.cohort!r} is {update.state}, or is ordered",
            )
    order = ForgetRecord(
        order_id=event.subject,
        cohort=event.cohort,
        node_id=body["node_id"],
        updates=tuple(body["updates"]),
        accept_loss=body["accept_loss"],
        by=body["by"],
        at=event.at,
    )
    state.forgets.put(order)
    settle_forgets(state, event)


@applies(EventKind.FORGET_FAILED)
def forget_failed(state: State, event: Event) -> None:
    order = known(event, state.forgets, event.subject, "order")
    if order.cohort != event.cohort or order.state not in ("ordered", "planned"):
        raise conflict(event, f"the order of cohort {order.cohort!r} is {order.state}")
    if order.plan_id is not None and not state.plans[order.plan_id].decided:
        cancel(state, event, state.plans[order.plan_id], event.body["reason"], requeue=True)
    state.forgets.put(replace(order, state="failed", plan_id=None, reason=event.body["reason"]))


def plan_removal(state: State, event: Event, plan: MergePlan) -> None:
    """Check that the plan's order waits for a removal, and that the plan's parent holds it."""
    assert plan.removal is not None
    order = known(event, state.forgets, plan.removal.order, "order")
    removed = [update.update_id for update in plan.removal.updates]
    held = set(state.contributions(plan.parent)).intersection(order.updates)
    if plan.updates or order.state != "ordered" or set(removed) != held or not held:
        raise conflict(
            event,
            f"order {order.order_id} is {order.state}; its parent holds {len(held)} of its updates",
        )
    state.forgets.put(replace(order, state="planned", plan_id=event.subject))


def decide_removal(state: State, plan: PlanRecord, verdict: VerdictRecord) -> None:
    """An accepted removal is done when its release is promoted."""
    removal = plan.plan.removal
    if removal is not None and not verdict.accepted:
        order = state.forgets[removal.order]
        state.forgets.put(replace(order, state="rejected", reason=verdict.text))


def fail_removals(state: State, cohort: str, abandoned: Collection[str]) -> None:
    # Only a canary can hold a removal that is not done: it is done when stable has it.
    for order in state.pending_forgets(cohort):
        made = state.plans[order.plan_id].candidate if order.plan_id else None
        if made in abandoned:
            failed = replace(
                order,
                state="failed",
                plan_id=None,
                reason="its release was rolled back from canary",
            )
            state.forgets.put(failed)


def settle_forgets(state: State, event: Event) -> None:
    """Forget what the stable head does not hold, of every order of the cohort."""
    orders = state.pending_forgets(event.cohort)
    if not orders:
        return
    ordered = [update for order in orders for update in order.updates]
    head = state.channels[(event.cohort, "stable")]
    held = state.holders(event.cohort, ordered).get(head, frozenset())
    forgotten: list[str] = []
    for order in orders:
        for update_id in order.updates:
            if update_id not in held and state.updates[update_id].state != "forgotten":
                cancel_plan_of(state, event, update_id)
                move(
                    state,
                    event,
                    update_id,
                    "forgotten",
                    _FORGETTABLE,
                    f"by order of {order.by}, {order.at}",
                )
                forgotten.append(update_id)
        if held.isdisjoint(order.updates):
            state.forgets.put(replace(order, state="done"))
    # No release that is made later holds any of it: plans on these releases are cancelled with
    # their withdrawal.
    for release_id in state.holders(event.cohort, forgotten):
        state.releases.mark_forgotten(release_id)
    withdraw(state, event)


def withdraw(state: State, event: Event) -> None:
    """Withdraw the releases that hold something forgotten; they are never promoted again.

    The line's other updates stay with the line.
    """
    line = {
        release.release_id for release in state.lineage(state.channels[(event.cohort, "stable")])
    }
    holding = [state.releases[release_id] for release_id in state.releases.holding_forgotten]
    holders = {release.release_id: release for release in holding if release.cohort == event.cohort}
    for release in holders.values():
        if release.state == "accepted":
            state.releases.put(replace(release, state="withdrawn"))
            held = [
                u for u in release.manifest.updates if is_merged_in(state, u, release.release_id)
            ]
            if release.release_id not in line:
                release_updates(state, event, held, ("merged",), True, release.manifest.label)
    cancel_built_on(state, event, holders, "withdrawn", requeue=True)
    for cohort in [cohort for cohort, other in state.builds_on.items() if other == event.cohort]:
        withdraw_composed(state, cohort)
    for (cohort, channel), head in list(state.channels.items()):
        if cohort == event.cohort and channel != "stable" and head in holders:
            point(state, event, channel, None, "central")


def withdraw_composed(state: State, cohort: str, since: str | None = None) -> None:
    """Withdraw what the stable head of a cohort that builds on another has left behind.

    The head itself goes when it moves. With `since`, an earlier head, only what was left behind
    from there on: the rest was looked at before.
    """
    other = state.builds_on.get(cohort)
    if other is None or not any(
        (o.cohort, o.state) == (other, "done") for o in state.forgets.values()
    ):
        return
    release = state.releases[state.channels[(cohort, "stable")]]
    while release.release_id != since and release.manifest.parent is not None:
        release = state.releases[release.manifest.parent]
        if release.state == "accepted" and state.forgotten_in(release.release_id):
            state.releases.put(replace(release, state="withdrawn"))
