"""From a plan to the payload of its candidate.

In: a plan, what it stands on, blobs, and the replies that name the plan's updates by digest. Out:
the payload. Guarantee: the plan and its blobs decide every byte. The loop and `central releases
verify` both merge here, so a plan that is merged again, now or years later, gives the same bytes.

A plan does one of three things:
- It merges updates into the cohort's own product.
- It takes contributions out of the own product. A replay goes back to the release before the first
  of them and makes every merge since then again without them (journal/removal.py).
- It merges nothing, because only the release of the other cohort has changed.

A cohort that builds on another keeps a chain of its own, P_own(0) = 0, to which its nodes'
increments are added. It serves trunc_R(P_other + P_own), made from the two products as they were
released. The other cohort's chain is only read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from central.cohort.errors import FederationError, StrategyFailed, UnusableUpdate
from central.cohort.planning import PRODUCT_MEAN
from central.cohort.strategies.flower import make_strategy
from central.cohort.strategies.product_mean import (
    COHORT,
    UPDATE,
    Blobs,
    ProductMean,
    Start,
    add_term,
    find_cause,
    finished,
    strategy_fails,
    to_tensors,
)
from central.journal import MergePlan, PlannedUpdate, State
from central.journal.removal import Line, line_of
from central.merging import ProductSum, one_thread
from central.merging.progress import shown
from protos.encoding import Encoding
from protos.lora import LoraCodecError, LoraTensors, decode, encode
from protos.manifest import sha256_hex


@dataclass(frozen=True)
class MergedPayload:
    """A candidate's payload (protos.lora), truncation error (relative), and what it keeps."""

    data: bytes
    truncation_error: float
    server_state: bytes | None = None
    own: bytes | None = None
    """The cohort's own product, where the payload is composed with another cohort's release."""
    own_truncation_error: float = 0.0


@dataclass(frozen=True)
class Steps:
    """What a removal does, as it was when its plan was made."""

    line: Line
    since_strategy: str
    """Strategy that made the release it goes back to; empty for version 0."""


@dataclass(frozen=True)
class Standing:
    """What a plan stands on."""

    start: Start
    server_state: str | None = None
    """Digest of what the parent's strategy left, whichever strategy that was."""
    other: str | None = None
    """Payload of the other cohort's release; None in a cohort that builds on none."""
    removal: Steps | None = None
    """Of a plan that takes contributions out."""


def standing_of(state: State, plan: MergePlan) -> Standing:
    """What the plan stands on."""
    parent = state.releases[plan.parent]
    other = state.releases[plan.builds_on].manifest.payload if plan.builds_on else None
    made_by = _strategy_of(state, parent.plan_id)
    # Another strategy's moments are other quantities. Changed options go on with the state that is
    # there.
    carried = parent.server_state if made_by == plan.strategy else None
    return Standing(
        Start(parent.manifest.own_payload.digest_sha256, carried or ""),
        parent.server_state,
        other.digest_sha256 if other else None,
        _steps_of(state, plan),
    )


def _steps_of(state: State, plan: MergePlan) -> Steps | None:
    if plan.removal is None:
        return None
    updates = [update.update_id for update in plan.removal.updates]
    line = line_of(state, state.releases[plan.parent], updates)
    return Steps(line, _strategy_of(state, line.since.plan_id))


def _strategy_of(state: State, plan_id: str | None) -> str:
    return state.plans[plan_id].plan.strategy if plan_id else ""


def plan_replies(plan: MergePlan) -> list[Message]:
    """One reply per update of the plan, in its order: which bytes are merged, and how strongly."""
    asked = Message(RecordDict(), COHORT, MessageType.TRAIN, group_id=str(plan.version))
    return [
        Message(RecordDict({UPDATE: ConfigRecord(_fields_of(update))}), reply_to=asked)
        for update in plan.updates
    ]


def _fields_of(update: PlannedUpdate) -> dict[str, str | int | float]:
    # Not model_dump: that leaves a factor of 1 out.
    return {
        "update_id": update.update_id,
        "payload": update.payload,
        "weight": update.weight,
        "factor": update.factor,
    }


def build_payload(
    plan: MergePlan,
    standing: Standing,
    strategy: ProductMean,
    blobs: Blobs,
    replies: Iterable[Message],
) -> MergedPayload | None:
    """The plan's candidate; None without replies to a plan of updates.

    Raises UnusableUpdate or StrategyFailed, for a plan without updates FederationError, and
    StorageError (BlobLost where trying again is no help).
    """
    messages = list(replies)  # digests only
    with one_thread, shown(plan.cohort, payloads=len(plan.updates) + 1):  # and the parent's
        if plan.updates:
            merged = _merge(strategy, plan, messages)
        elif standing.removal is not None:
            merged = _replay(standing.removal, blobs)
        else:
            kept = None if standing.server_state is None else blobs.read(standing.server_state)
            merged = MergedPayload(blobs.read(standing.start.parent), 0.0, kept)
        if merged is None or standing.other is None:
            return merged
        other = blobs.read(standing.other)
        try:
            return _compose(plan, merged, other)
        except StrategyFailed as error:
            if not plan.updates:
                raise FederationError(str(error)) from error
            parent = MergedPayload(blobs.read(standing.start.parent), 0.0)
            if cause := _cause(plan, strategy, messages, parent, other):
                raise UnusableUpdate(cause, str(error)) from error
            raise


def _merge(
    strategy: ProductMean, plan: MergePlan, replies: Iterable[Message]
) -> MergedPayload | None:
    arrays, metrics = strategy.aggregate_train(plan.version, replies)
    if arrays is None or metrics is None:
        return None
    # An own product that is composed with another release stays here, so it is not rounded.
    encoding = plan.encoding if plan.builds_on is None else "float32"
    data, error = _encoded(to_tensors(arrays), encoding), float(metrics["truncation-error"])
    return MergedPayload(data, error, strategy.server_state())


def _encoded(tensors: LoraTensors, encoding: Encoding) -> bytes:
    """The payload of what was merged; raises StrategyFailed where the encoding does not take it."""
    try:
        return encode(tensors, encoding)
    except LoraCodecError as error:
        raise StrategyFailed(f"What was merged cannot be released: {error}") from error


def _compose(plan: MergePlan, own: MergedPayload, other: bytes) -> MergedPayload:
    """trunc_R(P_other + P_own); the result keeps P_own beside it, for the next merge to add to.

    Raises StrategyFailed when the sum cannot be computed.
    """
    what = "The sum of the own product and the release that the cohort builds on"
    total = ProductSum(rank=plan.rank, seed=plan.seed, exact_rank=plan.exact_rank)
    for payload in (other, own.data):
        add_term(total, decode(payload), 1.0, what)
    served = finished(total, what)
    return replace(
        own,
        data=_encoded(served.tensors, plan.encoding),
        truncation_error=served.truncation_error,
        own=own.data,
        own_truncation_error=own.truncation_error,
    )


def _cause(
    plan: MergePlan,
    strategy: ProductMean,
    messages: Sequence[Message],
    parent: MergedPayload,
    other: bytes,
) -> str | None:
    """Id of the one update whose merge cannot be composed; None if no single one causes it.

    Other strategies than the product mean need their number of updates, so no part is tried.
    """
    if plan.strategy != PRODUCT_MEAN:
        return None

    def compose(kept: Sequence[int]) -> None:
        own = _merge(strategy, plan, [messages[index] for index in kept])
        _compose(plan, own or parent, other)  # None: of no updates

    cause = find_cause(len(messages), lambda kept: strategy_fails(lambda: compose(kept)))
    return None if cause is None else plan.updates[cause].update_id


def _replay(steps: Steps, blobs: Blobs) -> MergedPayload:
    """The own product that the line's merges make without what is removed."""
    line = steps.line
    own, kept = line.since.manifest.own_payload.digest_sha256, line.since.server_state
    merged = MergedPayload(blobs.read(own), 0.0, None if kept is None else blobs.read(kept))
    made_by = steps.since_strategy
    for record in line.merges:
        plan = _without(record.plan, line.without)
        if plan is None:
            continue
        made = _Made(blobs, merged)
        start = Start(made.own, made.server_state if made_by == plan.strategy else "")
        strategy = make_strategy(plan, start, made)
        try:
            again = _merge(strategy, plan, plan_replies(plan))
        except UnusableUpdate as error:
            raise FederationError(
                f"The merge of plan {record.plan_id[:8]} cannot be done again: {error}"
            ) from error
        if again is None:
            raise FederationError(f"{plan.strategy} made nothing of {len(plan.updates)} updates.")
        merged, made_by = again, plan.strategy
    return merged


def _without(plan: MergePlan, update_ids: frozenset[str]) -> MergePlan | None:
    """The plan without these updates, the others as strong as before; None without any."""
    updates = [planned for planned in plan.updates if planned.update_id not in update_ids]
    if not updates:
        return None
    step = plan.server_step
    if plan.strategy != PRODUCT_MEAN:  # it divides by the sum of the weights
        step *= sum(planned.weight for planned in updates) / sum(
            planned.weight for planned in plan.updates
        )
    return plan.model_copy(update={"updates": updates, "server_step": step})


class _Made:
    """Blobs, and what the last merge made, which is in no store."""

    def __init__(self, blobs: Blobs, merged: MergedPayload) -> None:
        self._blobs = blobs
        self.own = sha256_hex(merged.data)
        self.server_state = "" if merged.server_state is None else sha256_hex(merged.server_state)
        self._held = {self.own: merged.data, self.server_state: merged.server_state or b""}

    def read(self, digest: str) -> bytes:
        return self._held[digest] if digest in self._held else self._blobs.read(digest)
