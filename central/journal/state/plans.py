"""Events of plans: a merge is planned.

Guarantee: a plan takes only waiting updates of its cohort, onto an accepted parent.
"""

from __future__ import annotations

from central.journal.events import Event, EventKind
from central.journal.plan import MergePlan
from central.journal.records import PlanRecord
from central.journal.state.expect import conflict, expect_new, known
from central.journal.state.forgets import plan_removal
from central.journal.state.moves import move
from central.journal.state.state import State, applies
from protos.manifest import sha256_hex


@applies(EventKind.MERGE_PLANNED)
def merge_planned(state: State, event: Event) -> None:
    expect_new(event, state.plans)
    data = event.body["plan"].encode()
    plan, digest = MergePlan.from_bytes(data), sha256_hex(data)
    parent = known(event, state.releases, plan.parent, "release")
    if digest != event.subject or plan.cohort != event.cohort or parent.cohort != event.cohort:
        raise conflict(
            event, f"plan {digest} of cohort {plan.cohort!r} builds on one of {parent.cohort!r}"
        )
    if plan.removal is not None:
        plan_removal(state, event, plan)
    elif not plan.updates and plan.builds_on is None:
        raise conflict(event, "no update is planned")
    plan_composition(state, event, plan)
    if parent.state != "accepted":
        raise conflict(event, f"parent {parent.release_id} is {parent.state}")
    suspected, planned_ids = (
        state.suspects(event.cohort),
        {planned.update_id for planned in plan.updates},
    )
    for planned in plan.updates:
        update = known(event, state.updates, planned.update_id, "update")
        if (
            update.cohort != event.cohort
            or update.manifest.payload.digest_sha256 != planned.payload
        ):
            raise conflict(
                event,
                f"update {update.update_id} of cohort {update.cohort!r} has another payload or "
                "cohort",
            )
        move(state, event, planned.update_id, "planned", ("waiting",), plan_id=event.subject)
    suspects = {update.update_id for update in suspected}
    isolates = state.isolations[event.cohort].plan_id if suspects >= planned_ids > set() else None
    state.plans.put(PlanRecord(event.subject, plan, isolates=isolates))


def plan_composition(state: State, event: Event, plan: MergePlan) -> None:
    """Check that the plan names a release of the cohort that its own builds on, if there is one.

    A plan without updates must name a stable one.
    """
    other = state.builds_on.get(event.cohort)
    base = state.releases.get(plan.builds_on or "")
    if (base.cohort if base else None) != other or (plan.builds_on is not None and base is None):
        raise conflict(
            event,
            f"cohort {event.cohort!r} builds on {other or 'none'}, the plan on {plan.builds_on}",
        )
    if base is not None and not plan.updates and plan.removal is None:
        if base.state != "accepted":
            raise conflict(event, f"release {base.release_id} of {other!r} is {base.state}")
        state.changes.put(state.compositions, (plan.parent, base.release_id), event.subject)
