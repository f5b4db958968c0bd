"""When to merge, and what: the merge policy applied to the waiting updates of one cohort.

In: the state and the policy. Out: a MergePlan, or None while the policy says wait. Pure: the caller journals the plan.
Weights are equal shares, derived here; what a node claims (its number of examples) never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import central
from central.journal import MergePlan, PlannedUpdate, ReleaseRecord, State, UpdateRecord
from central.settings import MergePolicy

PRODUCT_MEAN = "product-mean"
SOFTWARE = f"lorikeet-central {central.__version__}"


def parse_time(text: str) -> datetime:
    """RFC 3339 as the journal writes it."""
    return datetime.fromisoformat(text)


def plan_merge(state: State, cohort: str, policy: MergePolicy, now: str) -> MergePlan | None:
    """The next plan on the cohort's stable head, or None. `now` is RFC 3339 and becomes the plan's `created_at`.

    While a rejected candidate's updates are searched for the one that hurts, parts of it are planned, and nothing else.
    """
    head = state.head(cohort)
    if head is None:
        return None
    if suspects := state.suspects(cohort):
        rejected = state.plans[state.isolations[cohort].plan_id].plan
        return _plan_part(rejected, head, suspects, now)
    updates = _due(state.waiting(cohort), policy, parse_time(now))
    if not updates:
        return None
    return MergePlan(
        cohort=cohort,
        parent=head.release_id,
        version=head.manifest.version + 1,
        base=head.manifest.base,
        updates=[_planned(update, 1 / len(updates)) for update in updates],
        strategy=policy.strategy,
        strategy_options=policy.strategy_options,
        rank=policy.rank,
        server_step=policy.server_step,
        seed=policy.seed,
        software=SOFTWARE,
        created_at=now,
    )


def _plan_part(rejected: MergePlan, head: ReleaseRecord, suspects: Sequence[UpdateRecord], now: str) -> MergePlan:
    """A part of a rejected plan on today's head, as strong as it was in the whole: what hurt there hurts as much here."""
    weights = {update.update_id: update.weight for update in rejected.updates}
    part = [_planned(update, weights[update.update_id]) for update in suspects]
    # Other strategies divide by the sum of the weights, so there the step carries the share.
    share = sum(update.weight for update in part) / sum(weights.values())
    step = rejected.server_step if rejected.strategy == PRODUCT_MEAN else rejected.server_step * share
    changed = {
        "parent": head.release_id,
        "version": head.manifest.version + 1,
        "updates": part,
        "server_step": step,
        "software": SOFTWARE,
        "created_at": now,
    }
    return rejected.model_copy(update=changed)


def _planned(update: UpdateRecord, weight: float) -> PlannedUpdate:
    payload = update.manifest.payload.digest_sha256
    return PlannedUpdate(update_id=update.update_id, payload=payload, weight=weight)


def _due(waiting: Sequence[UpdateRecord], policy: MergePolicy, now: datetime) -> Sequence[UpdateRecord]:
    """The updates to merge now, in admission order; empty while neither number nor age suffices."""
    groups: dict[str, list[UpdateRecord]] = {}
    for update in waiting:
        # A stock strategy averages factors, which means something only for increments from one start.
        start = "" if policy.strategy == PRODUCT_MEAN else update.manifest.start.release
        groups.setdefault(start, []).append(update)
    for group in groups.values():
        age_s = (now - parse_time(group[0].admitted_at)).total_seconds()
        if len(group) >= policy.min_updates or age_s >= policy.max_age_s:
            return group
    return ()
