"""When to merge, and what: the merge policy applied to the waiting updates of one cohort.

In: the state and the policy. Out: a MergePlan, or None while the policy says wait. Pure: the caller journals the plan.
Weights are equal shares, derived here; what a node claims (its number of examples) never enters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import central
from central.journal import MergePlan, PlannedUpdate, ReleaseRecord, State, UpdateRecord
from central.journal.removal import plan_removal
from central.settings import MergePolicy

PRODUCT_MEAN = "product-mean"
"""The one strategy that adds products, so that increments from any start can be merged."""
SOFTWARE = f"lorikeet-central {central.__version__}"


def least_updates(name: str, options: Mapping[str, Any]) -> int:
    """Fewest updates that the strategy can merge, with the protection that it promises."""
    malicious = int(options.get("num_malicious_nodes", 0))
    if name == "Bulyan":  # El Mhamdi et al., arXiv:1802.07927
        return 4 * malicious + 3
    if name in ("Krum", "MultiKrum") and malicious:  # Blanchard et al., arXiv:1703.02757: 2 f + 2 < n
        return 2 * malicious + 3
    return 1


def parse_time(text: str) -> datetime:
    """RFC 3339 as the journal writes it."""
    return datetime.fromisoformat(text)


def plan_merge(state: State, cohort: str, policy: MergePolicy, now: str) -> MergePlan | None:
    """The next plan on the cohort's stable head, or None. `now` is RFC 3339 and becomes the plan's `created_at`.

    What an operator ordered to be forgotten goes first. While a rejected candidate's updates are searched for the one that hurts,
    parts of it are planned, and nothing else; while a canary is ahead of stable, nothing is.
    """
    head = state.head(cohort)
    if head is None or state.soaking(cohort) is not None:
        return None
    if (removal := _removal(state, head, now)) is not None:
        return removal
    if suspects := state.suspects(cohort):
        rejected = state.plans[state.isolations[cohort].plan_id].plan
        return _plan_part(state, rejected, head, suspects, now)
    if (base := newer_base(state, head)) is not None:
        return _plan(head, policy, now, builds_on=base.release_id, **_strategy_of(state, head))
    updates = _due(state.waiting(cohort), policy, parse_time(now))
    if not updates:
        return None
    weight = 1 / len(updates)
    return _plan(
        head,
        policy,
        now,
        builds_on=_base_id(state, head),
        updates=[_planned(update, weight) for update in updates],
    )


def _removal(state: State, head: ReleaseRecord, now: str) -> MergePlan | None:
    """What takes the oldest order's contributions out of the head."""
    orders = [order for order in state.pending_forgets(head.cohort) if order.state == "ordered"]
    return plan_removal(state, orders[0], head, now, SOFTWARE) if orders else None


def newer_base(state: State, head: ReleaseRecord) -> ReleaseRecord | None:
    """The stable release of the cohort that this one builds on, where `head` is composed with another and the two were not tried
    together yet. It is tried without new updates, so that the gate judges one change at a time."""
    current = state.base_of(head)
    newest = state.head(current.cohort) if current else None
    if current is None or newest is None or newest.release_id == current.release_id:
        return None
    tried = (head.release_id, newest.release_id) in state.compositions
    return newest if state.members(head.cohort) and not tried else None


def _plan(head: ReleaseRecord, policy: MergePolicy, now: str, **fields: Any) -> MergePlan:
    values = {"updates": [], "strategy": policy.strategy, "strategy_options": policy.strategy_options, **fields}
    return MergePlan(
        cohort=head.cohort,
        parent=head.release_id,
        version=head.manifest.version + 1,
        base=head.manifest.base,
        rank=policy.rank,
        server_step=policy.server_step,
        seed=policy.seed,
        exact_rank=policy.exact_rank,
        software=SOFTWARE,
        created_at=now,
        **values,
    )


def _strategy_of(state: State, head: ReleaseRecord) -> dict[str, Any]:
    """A plan without updates merges nothing: what the head's strategy carries goes on with the head's strategy."""
    if head.plan_id is None:
        return {}
    plan = state.plans[head.plan_id].plan
    return {"strategy": plan.strategy, "strategy_options": plan.strategy_options}


def _base_id(state: State, head: ReleaseRecord) -> str | None:
    """What the next merge is composed with: what `head` is, unless something in that was forgotten since."""
    base = state.base_of(head)
    if base is not None and base.state == "withdrawn":
        base = state.head(base.cohort)
    return base.release_id if base else None


def still_stands(state: State, draft: MergePlan) -> bool:
    """Whether a draft can be recorded now: nothing that it depends on has changed since it was made."""
    head = state.head(draft.cohort)
    if head is None or head.release_id != draft.parent or _base_id(state, head) != draft.builds_on:
        return False
    if state.open_plans(draft.cohort) or state.soaking(draft.cohort) is not None:
        return False
    updates = [state.updates[planned.update_id] for planned in draft.updates]
    return all(update.state == "waiting" for update in updates)


def _plan_part(
    state: State, rejected: MergePlan, head: ReleaseRecord, suspects: Sequence[UpdateRecord], now: str
) -> MergePlan:
    """A part of a rejected plan on today's head, as strong as it was in the whole: what hurt there hurts as much here."""
    tried = {update.update_id for update in suspects}
    part = [update for update in rejected.updates if update.update_id in tried]
    changed = {
        "parent": head.release_id,
        "builds_on": _base_id(state, head),
        "version": head.manifest.version + 1,
        "updates": part,
        "left_out": [],
        "software": SOFTWARE,
        "created_at": now,
    }
    plan = rejected.model_copy(update=changed)
    if rejected.strategy == PRODUCT_MEAN:
        return plan
    # Other strategies divide by the sum of the weights, so there the step carries the share.
    return plan.model_copy(update={"server_step": rejected.server_step * _weight(plan) / _weight(rejected)})


def _weight(plan: MergePlan) -> float:
    return sum(update.weight for update in plan.updates)


def _planned(update: UpdateRecord, weight: float) -> PlannedUpdate:
    payload = update.manifest.payload.digest_sha256
    return PlannedUpdate(update_id=update.update_id, payload=payload, weight=weight)


def _due(waiting: Sequence[UpdateRecord], policy: MergePolicy, now: datetime) -> Sequence[UpdateRecord]:
    """The updates to merge now, in admission order; empty while neither number nor age suffices."""
    fewest = max(policy.fewest_updates, least_updates(policy.strategy, policy.strategy_options))
    groups: dict[str, list[UpdateRecord]] = {}
    for update in waiting:
        # A stock strategy averages factors, which means something only for increments from one start.
        start = "" if policy.strategy == PRODUCT_MEAN else update.manifest.start.release
        groups.setdefault(start, []).append(update)
    for group in groups.values():
        age_s = (now - parse_time(group[0].admitted_at)).total_seconds()
        if len(group) >= policy.min_updates or (age_s >= policy.max_age_s and len(group) >= fewest):
            return group
    return ()
