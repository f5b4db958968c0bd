"""What a plan makes: the merge of its updates, and in a cohort that builds on another the composition with that one's release.

In: a plan, what it stands on, the replies that name its updates. Out: the candidate's payload. A cohort that builds on another
keeps a chain of its own, P_own(0) = 0, to which its nodes' increments are added; what it serves is trunc_R(P_other + P_own), from
the two products as they were released, never folded into one another. Guarantee: the plan and its blobs decide every byte, for the
loop and for `central releases verify` alike; the other cohort's chain is read and never written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from flwr.app import Message

from central.federation.removal import Steps, steps_of, take_out
from central.federation.replies import MergedPayload, merge_replies
from central.federation.strategy import Blobs, ProductMean
from central.journal import MergePlan, State
from central.merging import ProductSum, one_thread
from protos.lora import decode, encode


@dataclass(frozen=True)
class Standing:
    """What a plan stands on, as digests of blobs."""

    own: str
    """The parent's own product (manifest.own_payload)."""
    server_state: str | None
    """What the parent's strategy left for the next merge."""
    other: str | None
    """Payload of the other cohort's release; None in a cohort that builds on none."""
    removal: Steps | None = None
    """Of a plan that takes contributions out."""


def standing_of(state: State, plan: MergePlan) -> Standing:
    """What the plan stands on."""
    parent = state.releases[plan.parent]
    other = state.releases[plan.builds_on].manifest.payload.digest_sha256 if plan.builds_on else None
    removal = steps_of(state, plan) if plan.removal else None
    return Standing(parent.manifest.own_payload.digest_sha256, parent.server_state, other, removal)


def build_payload(
    plan: MergePlan, standing: Standing, strategy: ProductMean, blobs: Blobs, replies: Iterable[Message]
) -> MergedPayload | None:
    """The plan's candidate; None without replies to a plan of updates.

    Raises UnusableUpdate or StrategyFailed, for a removal FederationError, and StorageError (BlobLost where trying again is no help).
    """
    with one_thread:
        return _build(plan, standing, strategy, blobs, replies)


def _build(
    plan: MergePlan, standing: Standing, strategy: ProductMean, blobs: Blobs, replies: Iterable[Message]
) -> MergedPayload | None:
    if plan.updates:
        merged = merge_replies(strategy, plan.version, replies)
    elif standing.removal is not None:
        merged = take_out(plan, standing.own, standing.removal, blobs)
    else:  # nothing new is merged: the other cohort's release is what changed
        kept = None if standing.server_state is None else blobs.read(standing.server_state)
        merged = MergedPayload(blobs.read(standing.own), 0.0, kept)
    if merged is None or standing.other is None:
        return merged
    return _compose(plan, merged, blobs.read(standing.other))


def _compose(plan: MergePlan, own: MergedPayload, other: bytes) -> MergedPayload:
    """trunc_R(P_other + P_own); the result keeps P_own beside it, for the next merge to add to."""
    total = ProductSum(rank=plan.rank, seed=plan.seed, exact_rank=plan.exact_rank)
    for payload in (other, own.data):
        total.add(decode(payload), 1.0)
    served = total.result()
    return replace(
        own,
        data=encode(served.tensors),
        truncation_error=served.truncation_error,
        own=own.data,
        own_truncation_error=own.truncation_error,
    )
