"""Train replies of a merge plan, and what merging them makes.

In: a plan and the state it stands in. Out: Flower messages that name updates by digest, then the payload of the candidate.
Guarantee: the loop and `central releases verify` both merge through here, so a plan that is merged again, now or years later,
goes the same way from the same blobs to the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from central.federation.server_state import carried_state
from central.federation.strategy import COHORT, MERGE, UPDATE, MergeTerms, ProductMean, to_tensors
from central.journal import MergePlan, PlanRecord, State
from protos.lora import encode


@dataclass(frozen=True)
class MergedPayload:
    """A candidate's payload (protos.lora), the merge's relative truncation error, and the strategy's state if it has any."""

    data: bytes
    truncation_error: float
    server_state: bytes | None = None
    own: bytes | None = None
    """The cohort's own product, where the payload is composed with another cohort's release (composition.py)."""
    own_truncation_error: float = 0.0


def train_replies(state: State, planned: PlanRecord) -> list[Message]:
    """One reply per update of the plan, in its order, with the plan's terms."""
    plan = planned.plan
    parent = state.releases[plan.parent].manifest.own_payload.digest_sha256
    manifests = {u.update_id: state.updates[u.update_id].manifest for u in plan.updates}
    senders = {update_id: manifest.node_id for update_id, manifest in manifests.items()}
    return plan_replies(plan, planned.plan_id, parent, carried_state(state, plan), senders)


def plan_replies(
    plan: MergePlan,
    plan_id: str,
    parent: str,
    server_state: str,
    senders: Mapping[str, str],
) -> list[Message]:
    """The replies of a plan that stands on the own product `parent` and goes on from `server_state`, both digests of blobs.

    `senders`: node by update.
    """
    terms = MergeTerms(
        plan_id=plan_id,
        parent_payload=parent,
        rank=plan.rank,
        server_step=plan.server_step,
        seed=plan.seed,
        server_state=server_state,
        exact_rank=plan.exact_rank,
    )
    replies = []
    for update in plan.updates:
        fields: dict[str, str | int | float] = {
            "update_id": update.update_id,
            "payload": update.payload,
            "weight": update.weight,
            "factor": update.factor,
        }
        content = RecordDict({UPDATE: ConfigRecord(fields), MERGE: terms.to_record()})
        asked = request(MessageType.TRAIN, senders[update.update_id], plan.version)
        replies.append(Message(content, reply_to=asked))
    return replies


def merge_replies(strategy: ProductMean, version: int, replies: Iterable[Message]) -> MergedPayload | None:
    """What the strategy makes of the replies; None without replies. Raises UnusableUpdate."""
    arrays, metrics = strategy.aggregate_train(version, replies)
    if arrays is None or metrics is None:
        return None
    return MergedPayload(encode(to_tensors(arrays)), float(metrics["truncation-error"]), strategy.server_state())


def request(message_type: str, node_id: str, version: int) -> Message:
    """The message that a reply of `node_id` answers."""
    return Message(
        content=RecordDict(), dst_node_id=flower_id(node_id), message_type=message_type, group_id=str(version)
    )


def flower_id(node_id: str) -> int:
    """Flower numbers its nodes: 63 bits of the SHA-256 of our id, never COHORT."""
    number = int.from_bytes(hashlib.sha256(node_id.encode()).digest()[:8], "big") >> 1
    return number or COHORT + 1
