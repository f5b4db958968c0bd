"""The merge plan: everything that makes one candidate deterministic.

In: field values. Out: a canonical document whose digest is the plan id. Guarantee: the plan and the
blobs it names are enough to rebuild the candidate's payload. A field that says nothing is left out
of the document.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from protos.encoding import Encoding
from protos.manifest import Digest, Document


class PlannedUpdate(Document):
    """One update's part in a merge."""

    update_id: Digest
    payload: Digest
    """Digest of the update's payload in the blob store."""
    weight: float
    """Derived centrally; never what a node claims."""
    factor: float = Field(default=1.0, exclude_if=lambda factor: factor == 1.0)
    """What a norm clip multiplies the increment with; derived centrally, 1 without a clip."""


class LeftOut(Document):
    """An update that was due and that a filter kept out of the merge; it is set aside."""

    update_id: Digest
    reason: str


class Removal(Document):
    """What a merge takes out of the head (`central forget`; cohort/payload.py)."""

    order: str
    """The order that asked for it."""
    since: Digest
    """Release before the first merge that held any of it: the replay begins here."""
    updates: list[PlannedUpdate]
    """What is taken out, in admission order.

    A weight is the update's weight in its merge times that merge's server step.
    """
    merges: int = Field(ge=0)
    """Merges between `since` and the head."""


class MergePlan(Document):
    """One merge, before it is done."""

    schema_version: Literal[1] = 1
    cohort: str
    parent: Digest
    """Release that the merge builds on."""
    builds_on: Digest | None = Field(default=None, exclude_if=lambda release: release is None)
    """Release of the other cohort that the result is composed with (manifest.Composition); only in
    cohorts that build on another. Such a plan may have no updates: it composes the parent's own
    product with a newer release of the other cohort.
    """
    version: int = Field(ge=1)
    """Version of the candidate: the parent's plus one."""
    base: Digest
    updates: list[PlannedUpdate]
    """In admission order."""
    left_out: list[LeftOut] = Field(default_factory=list, exclude_if=lambda left_out: not left_out)
    """In admission order."""
    filter: str = Field(default="", exclude_if=lambda name: not name)
    """Filter with its options that the due updates went through; empty for none."""
    strategy: str
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    rank: int = Field(ge=1)
    """R: the released product keeps at most this rank."""
    server_step: float
    """eta in P(v+1) = trunc_R(P(v) + eta * U)."""
    seed: int
    exact_rank: int = Field(ge=1)
    """Largest summed rank of a module that is cut in one exact step.

    Above it terms are folded (central/merging).
    """
    encoding: Encoding = Field(default="float32", exclude_if=lambda encoding: encoding == "float32")
    """How the payload that is released holds the factors (protos/encoding.py)."""
    blas_threads: Literal[1] = 1
    """BLAS threads that the merge computes with.

    The result must not depend on the machine's load, cores or environment.
    """
    software: str
    created_at: str
    """RFC 3339 UTC. The candidate's manifest has the same time, so a rebuild has its digest."""
    removal: Removal | None = Field(default=None, exclude_if=lambda removal: removal is None)
    """Set for a plan without updates that takes contributions out."""
