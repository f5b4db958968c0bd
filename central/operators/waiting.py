"""What an order to forget waits for, and what an operator can do about it.

In: the state, and why the cohort's loop does not go on, if it does not. Out: words; empty while the
order goes its way.
"""

from __future__ import annotations

from central.journal import EvaluationRecord, PlanRecord, ReleaseRecord, State
from central.journal.records import ForgetRecord

MAX_NAMED = 5
"""At most so many nodes are named with what they said."""


def waits_for(state: State, order: ForgetRecord, failure: str) -> str:
    """What holds the order up; `failure` is of its cohort's loop (central/cohorts.py)."""
    if order.state not in ("ordered", "planned"):
        return ""
    held_up = _planned(state, order) if order.state == "planned" else _ordered(state, order)
    return held_up or (f"what failed and is tried again: {failure}" if failure else "")


def _ordered(state: State, order: ForgetRecord) -> str:
    if (canary := state.soaking(order.cohort)) is not None:
        return _soaks(canary)
    for plan in state.open_plans(order.cohort):
        if plan.candidate is not None and (lacking := _lacking(state, plan)):
            label = state.releases[plan.candidate].manifest.label
            return (
                f"the verdict on {label}, a merge under way: {lacking}. `central updates "
                "set-aside` takes it back"
            )
    return ""


def _planned(state: State, order: ForgetRecord) -> str:
    plan = state.plans[order.plan_id or ""]
    if plan.candidate is None:
        return ""
    made = state.releases[plan.candidate]
    if made.state == "accepted":
        return _soaks(made)
    lacking = _lacking(state, plan)
    if not lacking or order.accept_loss:  # released without them when the look is over
        return lacking
    target = order.node_id or order.order_id[:8]
    again = f"`central forget {order.node_id or order.updates[0][:12]} --accept-loss --yes`"
    return (
        f"{lacking}. Nothing else of {order.cohort} is merged meanwhile. Let a node evaluate, or "
        f"take the order back with `central forget {target} --cancel`; {again} then releases it "
        "unjudged"
    )


def _soaks(canary: ReleaseRecord) -> str:
    return f"the canary {canary.manifest.label}, which soaks (`central releases list`)"


def _lacking(state: State, plan: PlanRecord) -> str:
    """What a verdict lacks though the first look is over, or nobody can be asked; else empty."""
    nodes = state.members(plan.plan.cohort)
    if not nodes:
        return "a node that could judge it: the cohort has none"
    offers = state.offers_of(plan.candidate) if plan.candidate else []
    if len(offers) < 2 or offers[-1].look > 1:
        return ""
    words = {node_id: _word(node_id, offers) for node_id in nodes}
    without = [f"{node_id}: {word}" for node_id, word in words.items() if word]
    more = f" and {len(without) - MAX_NAMED} more" if len(without) > MAX_NAMED else ""
    return (
        f"results of as many nodes as CENTRAL_GATE__QUORUM says: asked {len(offers)} times, "
        f"{len(words) - len(without)} gave one ({'; '.join(without[:MAX_NAMED])}{more})"
    )


def _word(node_id: str, offers: list[EvaluationRecord]) -> str:
    """Why the node gave no result, in its last words; empty when it gave one."""
    reports = [offer.reports[node_id] for offer in offers if node_id in offer.reports]
    if any(report.results for report in reports):
        return ""
    return reports[-1].abstain_reason if reports else "no report"
