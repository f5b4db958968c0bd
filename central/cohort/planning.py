"""When to merge, and what: the merge policy applied to the waiting updates of one cohort.

In: the state and the policy. Out: a merge plan in the journal, or none while the policy says wait.
Guarantees: plan and set-aside updates are one transaction. Weights are equal shares, derived here;
what a node claims (its number of examples) never enters. `plan_merge` is pure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import central
from central.cohort.errors import LostUpdate, UnusableUpdate
from central.journal import (
    EventKind,
    Journal,
    MergePlan,
    NewEvent,
    PlannedUpdate,
    PlanRecord,
    ReleaseRecord,
    State,
    UpdateRecord,
)
from central.journal.removal import plan_removal
from central.settings import MergePolicy

log = logging.getLogger(__name__)

PRODUCT_MEAN = "product-mean"
"""The one strategy that adds products, so that increments from any start can be merged."""
SOFTWARE = f"lorikeet-central {central.__version__}"

Screen = Callable[[MergePlan, str], MergePlan]
"""Filters a drafted plan; also gets the parent's own payload (screening.py)."""


class Planner:
    """One per cohort's loop. `screen`: None merges all that is due."""

    def __init__(
        self,
        cohort: str,
        journal: Journal,
        policy: MergePolicy,
        screen: Screen | None,
        clock: Callable[[], str],
    ) -> None:
        self._cohort = cohort
        self._journal = journal
        self._policy = policy
        self._screen = screen
        self._clock = clock

    def under_way(self, state: State) -> PlanRecord | None:
        """The cohort's oldest plan without a verdict."""
        return next(iter(state.open_plans(self._cohort)), None)

    def plan(self, state: State) -> PlanRecord | MergePlan | None:
        """The next plan, recorded; or a draft to be screened; None while the policy says wait.

        Call it under the journal's lock, so that nothing changes between the decision and its
        record.
        """
        plan = plan_merge(state, self._cohort, self._policy, self._clock())
        if plan is None:
            return None
        # Parts of a rejected plan were filtered as a whole.
        if self._screen is not None and plan.updates and not state.suspects(self._cohort):
            return plan
        return self._record(state, plan)

    def screen(self, draft: MergePlan) -> None:
        """Record the filtered plan, or set aside an update that cannot be read.

        Does neither when the state has moved on meanwhile.
        """
        assert self._screen is not None
        with self._journal.read() as state:
            parent = state.releases[draft.parent].manifest.own_payload.digest_sha256
        try:
            plan, unusable = self._screen(draft, parent), None
        except UnusableUpdate as error:
            plan, unusable = draft, error
        with self._journal.read() as state:
            if not still_stands(state, draft):
                return
            if unusable is None:
                self._record(state, plan)
            else:
                set_aside(self._journal, self._cohort, unusable)

    def _record(self, state: State, plan: MergePlan) -> PlanRecord:
        """In one transaction: what a filter left out is set aside, the rest is planned."""
        left_out = [
            NewEvent(
                EventKind.UPDATE_SET_ASIDE, self._cohort, left.update_id, {"reason": left.reason}
            )
            for left in plan.left_out
        ]
        body = {"plan": plan.to_bytes().decode()}
        planned = NewEvent(EventKind.MERGE_PLANNED, self._cohort, plan.digest, body)
        self._journal.append(*left_out, planned)
        log.info(
            "merge planned",
            extra={
                "cohort": self._cohort,
                "plan": plan.digest,
                "updates": len(plan.updates),
                "left_out": len(left_out),
            },
        )
        return state.plans[plan.digest]


def set_aside(journal: Journal, cohort: str, error: UnusableUpdate) -> None:
    """Journal that an update cannot be merged, and whether its node may send it again."""
    body: dict[str, Any] = {"reason": str(error)}
    if isinstance(error, LostUpdate):
        body["lost"] = True
    journal.append(NewEvent(EventKind.UPDATE_SET_ASIDE, cohort, error.update_id, body))
    log.error(
        "update set aside",
        extra={"cohort": cohort, "update_id": error.update_id, "reason": str(error)},
    )


def least_updates(name: str, options: Mapping[str, Any]) -> int:
    """Fewest updates that the strategy can merge, with the protection that it promises."""
    malicious = int(options.get("num_malicious_nodes", 0))
    if name == "Bulyan":  # El Mhamdi et al., arXiv:1802.07927
        return 4 * malicious + 3
    # Blanchard et al., arXiv:1703.02757: 2 f + 2 < n
    if name in ("Krum", "MultiKrum") and malicious:
        return 2 * malicious + 3
    return 1


def parse_time(text: str) -> datetime:
    """RFC 3339 as the journal writes it."""
    return datetime.fromisoformat(text)


def plan_merge(state: State, cohort: str, policy: MergePolicy, now: str) -> MergePlan | None:
    """The next plan on the cohort's stable head, or None. `now`: the plan's `created_at`, RFC 3339.

    What an operator ordered to be forgotten goes first. While a rejected candidate's updates are
    searched for the one that hurts, parts of it are planned, and nothing else; while a canary is
    ahead of stable, nothing is.
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
    """A newer stable release of the cohort that this one builds on, if it is untried with `head`.

    It is tried without new updates, so that the gate judges one change at a time.
    """
    current = state.base_of(head)
    newest = state.head(current.cohort) if current else None
    if current is None or newest is None or newest.release_id == current.release_id:
        return None
    tried = (head.release_id, newest.release_id) in state.compositions
    return newest if state.members(head.cohort) and not tried else None


def _plan(head: ReleaseRecord, policy: MergePolicy, now: str, **fields: Any) -> MergePlan:
    values = {
        "updates": [],
        "strategy": policy.strategy,
        "strategy_options": policy.strategy_options,
        **fields,
    }
    return MergePlan(
        cohort=head.cohort,
        parent=head.release_id,
        version=head.manifest.version + 1,
        base=head.manifest.base,
        rank=policy.rank,
        server_step=policy.server_step,
        encoding=policy.encoding,
        seed=policy.seed,
        exact_rank=policy.exact_rank,
        software=SOFTWARE,
        created_at=now,
        **values,
    )


def _strategy_of(state: State, head: ReleaseRecord) -> dict[str, Any]:
    """A plan without updates merges nothing, so the head's strategy goes on."""
    if head.plan_id is None:
        return {}
    plan = state.plans[head.plan_id].plan
    return {"strategy": plan.strategy, "strategy_options": plan.strategy_options}


def _base_id(state: State, head: ReleaseRecord) -> str | None:
    """What the next merge is composed with: as `head`, unless that was withdrawn since."""
    base = state.base_of(head)
    if base is not None and base.state == "withdrawn":
        base = state.head(base.cohort)
    return base.release_id if base else None


def still_stands(state: State, draft: MergePlan) -> bool:
    """Whether a draft can be recorded: nothing that it depends on has changed meanwhile."""
    head = state.head(draft.cohort)
    if head is None or head.release_id != draft.parent or _base_id(state, head) != draft.builds_on:
        return False
    if state.open_plans(draft.cohort) or state.soaking(draft.cohort) is not None:
        return False
    if (
        _removal(state, head, draft.created_at) is not None
        or state.suspects(draft.cohort)
        or newer_base(state, head) is not None
    ):
        return False  # that goes before new updates
    updates = [state.updates[planned.update_id] for planned in draft.updates]
    return all(update.state == "waiting" for update in updates)


def _plan_part(
    state: State,
    rejected: MergePlan,
    head: ReleaseRecord,
    suspects: Sequence[UpdateRecord],
    now: str,
) -> MergePlan:
    """A part of a rejected plan on today's head.

    It is as strong as it was in the whole: what hurt there hurts as much here.
    """
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
    return plan.model_copy(
        update={"server_step": rejected.server_step * _weight(plan) / _weight(rejected)}
    )


def _weight(plan: MergePlan) -> float:
    return sum(update.weight for update in plan.updates)


def _planned(update: UpdateRecord, weight: float) -> PlannedUpdate:
    payload = update.manifest.payload.digest_sha256
    return PlannedUpdate(update_id=update.update_id, payload=payload, weight=weight)


def _due(
    waiting: Sequence[UpdateRecord], policy: MergePolicy, now: datetime
) -> Sequence[UpdateRecord]:
    """The updates to merge now, in admission order; empty while neither number nor age suffices."""
    fewest = max(policy.fewest_updates, least_updates(policy.strategy, policy.strategy_options))
    groups: dict[str, list[UpdateRecord]] = {}
    for update in waiting:
        # A stock strategy averages factors, which means something only for increments from one
        # start.
        start = "" if policy.strategy == PRODUCT_MEAN else update.manifest.start.release
        groups.setdefault(start, []).append(update)
    for group in groups.values():
        age_s = (now - parse_time(group[0].admitted_at)).total_seconds()
        if len(group) >= policy.min_updates or (age_s >= policy.max_age_s and len(group) >= fewest):
            return group
    return ()
