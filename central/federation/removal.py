"""Takes contributions out of a line of releases: the merge of a removal plan.

In: what the plan stands on, blobs. Out: the cohort's own product without them, and the server state that the next merge goes on
from. Guarantees: a replay makes every merge through replies.py, as it was made first, so that it has the bytes of a history in
whose plans the contributions never were; the plan and its blobs decide every byte. journal/removal.py says what the methods mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from central.federation.errors import FederationError, UnusableUpdate
from central.federation.planning import PRODUCT_MEAN
from central.federation.replies import MergedPayload, merge_replies, plan_replies
from central.federation.stock import make_strategy
from central.federation.strategy import Blobs
from central.journal import MergePlan, State
from central.journal.removal import Line, line_of
from protos.manifest import sha256_hex


@dataclass(frozen=True)
class Steps:
    """What a removal does, as it was when its plan was made."""

    line: Line
    senders: Mapping[str, str]
    """Node by update."""
    since_strategy: str
    """Strategy that made the release it goes back to; empty for version 0."""


def steps_of(state: State, plan: MergePlan) -> Steps:
    """What the removal plan does."""
    assert plan.removal is not None
    parent = state.releases[plan.parent]
    line = line_of(state, parent, [update.update_id for update in plan.removal.updates])
    named = [planned for record in line.merges for planned in record.plan.updates]
    return Steps(
        line=line,
        senders={planned.update_id: state.updates[planned.update_id].manifest.node_id for planned in named},
        since_strategy=state.plans[line.since.plan_id].plan.strategy if line.since.plan_id else "",
    )


def take_out(plan: MergePlan, head: str, steps: Steps, blobs: Blobs) -> MergedPayload:
    """The own product of the plan's parent, whose payload is `head`, without what the plan removes.

    Raises FederationError when a merge cannot be done again, StorageError when a payload cannot be read.
    """
    assert plan.removal is not None
    return _replay(steps, blobs)


def without(plan: MergePlan, update_ids: frozenset[str]) -> MergePlan | None:
    """The plan without these updates, the others as strong as they were; None when nothing new is left."""
    updates = [planned for planned in plan.updates if planned.update_id not in update_ids]
    if not updates:
        return None
    step = plan.server_step
    if plan.strategy != PRODUCT_MEAN:  # it divides by the sum of the weights
        step *= sum(planned.weight for planned in updates) / sum(planned.weight for planned in plan.updates)
    return plan.model_copy(update={"updates": updates, "server_step": step})


def _replay(steps: Steps, blobs: Blobs) -> MergedPayload:
    line = steps.line
    own, kept = line.since.manifest.own_payload.digest_sha256, line.since.server_state
    merged = MergedPayload(blobs.read(own), 0.0, None if kept is None else blobs.read(kept))
    strategy = steps.since_strategy
    for record in line.merges:
        plan = without(record.plan, line.without)
        if plan is None:
            continue
        made = _Made(blobs, merged)
        carried = made.server_state if strategy == plan.strategy else ""
        replies = plan_replies(plan, record.plan_id, made.own, carried, steps.senders)
        try:
            again = merge_replies(make_strategy(plan.strategy, plan.strategy_options, made), plan.version, replies)
        except UnusableUpdate as error:
            raise FederationError(f"The merge of plan {record.plan_id[:8]} cannot be done again: {error}") from error
        if again is None:
            raise FederationError(f"{plan.strategy} made nothing of {len(plan.updates)} updates.")
        merged, strategy = again, plan.strategy
    return merged


class _Made:
    """Blobs, and what the last merge made, which is in no store."""

    def __init__(self, blobs: Blobs, merged: MergedPayload) -> None:
        self._blobs = blobs
        self.own = sha256_hex(merged.data)
        self.server_state = "" if merged.server_state is None else sha256_hex(merged.server_state)
        self._held = {self.own: merged.data, self.server_state: merged.server_state or b""}

    def read(self, digest: str) -> bytes:
        return self._held[digest] if digest in self._held else self._blobs.read(digest)
