"""The merge plan: everything that makes one candidate deterministic.

In: field values. Out: a canonical document whose digest is the plan id. Guarantee: the plan and the blobs it names
are enough to rebuild the candidate's payload.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from protos.manifest import Digest, Document


class PlannedUpdate(Document):
    """One update's part in a merge."""

    update_id: Digest
    payload: Digest
    """Digest of the update's payload in the blob store."""
    weight: float
    """Derived centrally; never what a node claims."""


class MergePlan(Document):
    """One merge, before it is done."""

    schema_version: Literal[1] = 1
    cohort: str
    parent: Digest
    """Release that the merge builds on."""
    version: int = Field(ge=1)
    """Version of the candidate: the parent's plus one."""
    base: Digest
    updates: list[PlannedUpdate]
    """In admission order."""
    strategy: str
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    rank: int = Field(ge=1)
    """R: the released product keeps at most this rank."""
    server_step: float
    """eta in P(v+1) = trunc_R(P(v) + eta * U)."""
    seed: int
    software: str
    created_at: str
    """RFC 3339 UTC; the candidate's manifest carries the same time, so that a rebuild has the same digest."""
