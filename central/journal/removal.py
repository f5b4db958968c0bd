"""Removals: a merge of its own takes contributions out of a line of releases.

In: the state, and updates that a release holds. Out: the merges that have to be done again without
them, and the plan of the removal. Pure; `central forget` orders it and cohort/payload.py does it.

A replay goes back to the release before the first merge that held any of the updates. It does every
merge since again without them. Every other update keeps the weight that it had, so the result is to
the bit that of a history in whose plans they never were. Shares are not raised to make up for them:
what the gate saw of the others stays as strong as it was. Strategies that divide by the sum of the
weights get the remaining share as a smaller server step, as isolation does. A merge that held
nothing else is left out.

A removal does not take out what others learnt from a release that held them: an update is an
increment on its start.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from central.journal.plan import MergePlan, PlannedUpdate, Removal
from central.journal.records import ForgetRecord, PlanRecord, ReleaseRecord
from central.journal.state import State

PRODUCT_MEAN = "product-mean"


@dataclass(frozen=True)
class Line:
    """The merges of a line that a removal reaches back to."""

    since: ReleaseRecord
    """The release before them."""
    merges: tuple[PlanRecord, ...]
    """Oldest first, without the removals among them."""
    without: frozenset[str]
    """What a replay leaves out: these updates, and what earlier removals in the line took out."""


def line_of(state: State, head: ReleaseRecord, update_ids: Collection[str]) -> Line:
    """The line back to before the first merge of any of the updates.

    `head` must hold at least one of them.
    """
    lineage = state.lineage(head.release_id)[::-1]
    without, first = frozenset(update_ids), len(lineage)
    while True:
        found = next(
            i for i, release in enumerate(lineage) if without.intersection(release.manifest.updates)
        )
        earlier = without.union(*(state.removed(release) for release in lineage[found:]))
        if (found, earlier) == (first, without):
            break
        first, without = found, earlier
    plans = [state.plans[release.plan_id] for release in lineage[first:] if release.plan_id]
    return Line(
        since=lineage[first - 1],
        merges=tuple(record for record in plans if record.plan.updates),
        without=without,
    )


def replay_blobs(state: State, line: Line) -> Iterator[str]:
    """Digests of everything that a replay of the line reads."""
    yield line.since.manifest.own_payload.digest_sha256
    if line.since.server_state is not None:
        yield line.since.server_state
    for record in line.merges:
        for planned in record.plan.updates:
            if planned.update_id not in line.without:
                yield planned.payload


def taken_out(line: Line, update_ids: Collection[str]) -> list[PlannedUpdate]:
    """The updates with the weight that each has in the head, in admission order within a merge.

    The weight includes the server step and a clip.
    """
    return [
        PlannedUpdate(
            update_id=planned.update_id,
            payload=planned.payload,
            weight=planned.weight * planned.factor * record.plan.server_step,
        )
        for record in line.merges
        for planned in record.plan.updates
        if planned.update_id in update_ids
    ]


def plan_removal(
    state: State, order: ForgetRecord, head: ReleaseRecord, now: str, software: str
) -> MergePlan | None:
    """The plan that takes the order's updates out of the head; None when it holds none of them."""
    held = set(state.contributions(head.release_id)).intersection(order.updates)
    if not held:
        return None
    line = line_of(state, head, held)
    left = [
        record
        for record in line.merges
        if any(u.update_id not in line.without for u in record.plan.updates)
    ]
    last = left[-1].plan if left else line.merges[-1].plan
    # Whose state the result carries: that of the last of these merges, or of the release before
    # them.
    before = state.plans[line.since.plan_id].plan if line.since.plan_id else None
    carries = left[-1].plan if left else before
    base = state.base_of(head)
    return MergePlan(
        cohort=order.cohort,
        parent=head.release_id,
        builds_on=base.release_id if base else None,
        version=head.manifest.version + 1,
        base=head.manifest.base,
        updates=[],
        strategy=PRODUCT_MEAN if carries is None else carries.strategy,
        strategy_options={} if carries is None else carries.strategy_options,
        rank=last.rank,
        server_step=1.0,
        seed=last.seed,
        exact_rank=last.exact_rank,
        software=software,
        created_at=now,
        removal=Removal(
            order=order.order_id,
            since=line.since.release_id,
            updates=taken_out(line, held),
            merges=len(line.merges),
        ),
    )


def exactness(since: str, merges: int) -> str:
    """What the removal's result is, in words; `since` is the version that it reaches back to."""
    number = f"{merges} merge{'s' if merges != 1 else ''} since {since}"
    return (
        f"exact: the {number} are done again without it and with every other weight as it was; "
        "bit-identical to a history in which it was never merged"
    )
