"""What the state holds, one frozen record per thing.

In: values from events. Out: immutable records, safe to keep after the journal's lock is released; a
change is a new record in the state's dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from central.journal.plan import MergePlan
from protos.manifest import ReleaseManifest, UpdateManifest

UpdateStateName = Literal[
    "waiting", "planned", "merged", "superseded", "set_aside", "quarantined", "forgotten"
]
ReleaseStateName = Literal["candidate", "accepted", "rejected", "abandoned", "withdrawn"]
"""withdrawn: accepted once, but it holds a contribution that was forgotten.

It can be neither promoted nor returned to.
"""
ForgetStateName = Literal["ordered", "planned", "done", "rejected", "failed"]


@dataclass(frozen=True)
class TokenRecord:
    """A join token; only the hash of its secret is known."""

    token_id: str
    cohort: str
    secret_sha256: str
    uses: int
    expires_at: str
    """RFC 3339 UTC."""
    created_at: str
    readmits: str = ""
    """Revoked node whose name may be enrolled again with it; empty for most."""
    revoked: str = ""
    """Why its remaining uses are over; empty while they are not."""
    nodes: tuple[str, ...] = ()
    """Nodes that enrolled with it."""

    @property
    def used(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True)
class NodeRecord:
    """An enrolled node."""

    node_id: str
    name: str
    cohort: str
    token_id: str
    public_key_pem: str
    base: str
    certificate_sha256: str
    enrolled_at: str
    revoked: bool = False
    quarantine: str = ""
    """Why its updates are kept aside; empty when they are not."""
    judged: tuple[bool, ...] = ()
    """The last verdicts on its updates since it was last released from quarantine, newest last.

    True when an update was blamed, that is rejected alone.
    """
    silent_since: str = ""
    """Since when central asks it to evaluate but does not wait for it; else empty.

    It held up an evaluation without a result, and gave none in time since.
    """


@dataclass(frozen=True)
class UpdateRecord:
    """An admitted update and where it stands."""

    update_id: str
    manifest: UpdateManifest
    cohort: str
    state: UpdateStateName
    admitted_at: str
    admitted_sequence: int
    """Sequence of the journal event that admitted it."""
    admitted_hash: str
    """Hash of that event; both are in the receipt."""
    plan_id: str | None = None
    release_id: str | None = None
    """Candidate or release that holds it."""
    reason: str = ""
    """Why it was superseded, set aside or quarantined."""
    since: str = ""
    """When it came into its state; empty: when it was admitted."""
    lost: bool = False
    """Set aside because its payload is gone or damaged: its node may send the bytes again."""


@dataclass(frozen=True)
class PlanRecord:
    """A planned merge. `decided`: its candidate has a verdict, or the plan was cancelled (by a
    rollback of its parent, or because one of its updates was taken away before the candidate
    existed).
    """

    plan_id: str
    plan: MergePlan
    candidate: str | None = None
    decided: bool = False
    isolates: str | None = None
    """The rejected plan that it tries a part of (isolation.py)."""


@dataclass(frozen=True)
class VerdictRecord:
    """The gate's decision on one candidate."""

    accepted: bool
    text: str
    environments: Any
    """As the gate wrote it: per-environment counts and figures."""
    high_water: Any
    """As the gate wrote it: the releases that it compared with.
    """
    at: str
    loss_accepted_by: str = ""
    """Operator who accepted a removal that the gate rejected."""


@dataclass(frozen=True)
class ReleaseRecord:
    """A candidate or release. `manifest_bytes` is exactly what `signature` signs."""

    release_id: str
    manifest: ReleaseManifest
    manifest_bytes: bytes
    signature: bytes
    cohort: str
    state: ReleaseStateName
    sequence: int
    """Sequence of the journal event that made it."""
    plan_id: str | None = None
    verdict: VerdictRecord | None = None
    server_state: str | None = None
    """Blob with what its strategy carries to the next merge (cohort/strategies/moments.py).

    Merges on this release need it.
    """

    @property
    def label(self) -> str:
        """The manifest's label, without computing its digest again."""
        return f"v{self.manifest.version}-{self.release_id[:8]}"


@dataclass(frozen=True)
class ChannelChange:
    """A channel began to point at a release, or at none when `release_id` is None."""

    channel: str
    release_id: str | None
    by: str
    """Operator's name, `gate`, or `central` for version 0."""
    at: str
    sequence: int


@dataclass(frozen=True)
class ForgetRecord:
    """An operator's order to forget a node's contributions, or single updates."""

    order_id: str
    cohort: str
    node_id: str
    """Empty for single updates."""
    updates: tuple[str, ...]
    accept_loss: bool
    by: str
    at: str
    state: ForgetStateName = "ordered"
    """done: no release that a channel points at holds any of it.

    rejected, failed: what was merged is still there.
    """
    plan_id: str | None = None
    reason: str = ""
    """Why it was rejected or failed."""


@dataclass(frozen=True)
class ServedPeriod:
    """A node said that it serves a release, from then on until it said another one."""

    node_id: str
    release_id: str
    since: str
    until: str = ""
    """Empty while it is the last that the node named."""


@dataclass(frozen=True)
class CanaryReport:
    """How a node that follows the canary channel fares with the release there.

    There is one whenever that changes.
    """

    node_id: str
    condition: Literal["serving", "trouble", "left"]
    """left: it follows another channel now."""
    problem: str
    """Empty without trouble."""
    at: str


@dataclass(frozen=True)
class CollectedBlob:
    """A blob that retention deleted, or is about to delete."""

    digest: str
    size_bytes: int
    reason: str
    collection_id: str
    at: str

    @property
    def text(self) -> str:
        """For messages."""
        return f"collected on {self.at[:10]} ({self.reason})"


@dataclass(frozen=True)
class TrainOfferRecord:
    """A cohort's standing invitation to train."""

    offer_id: str
    cohort: str
    max_rank: int


@dataclass(frozen=True)
class EvaluationReport:
    """One node's answer to an evaluation offer.

    `results` has the fields of lorikeet.releases.v1.EnvironmentResult.
    """

    node_id: str
    results: tuple[Mapping[str, Any], ...]
    abstain_reason: str
    at: str
    late: bool = False
    """It came after the verdict, so it does not count; it only shows that the node evaluates again.
    """


@dataclass(frozen=True)
class Suite:
    """Held-out tasks of one environment at each node: `tasks` after the first `first_task`."""

    first_task: int
    tasks: int


@dataclass(frozen=True)
class EvaluationRecord:
    """One look at a candidate that some nodes were asked for."""

    offer_id: str
    cohort: str
    candidate: str
    reference: str
    tasks: int
    deadline_at: str
    """RFC 3339 UTC."""
    nodes: tuple[str, ...]
    reports: Mapping[str, EvaluationReport] = field(default_factory=dict)
    look: int = 1
    references: Mapping[str, str] = field(default_factory=dict)
    """Environment -> release that it is compared with, where that is not `reference`."""
    suites: Mapping[str, Suite] = field(default_factory=dict)
    """Only these environments are asked; empty: all of them, the first `tasks` tasks of each."""
    so_far: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What the gate found at the look before, in the form of a verdict's `environments`."""
    attempts: int = 1
    temperature: float = 0.0

    def suite(self, environment: str) -> Suite | None:
        """What is asked of one environment; None: nothing."""
        return self.suites.get(environment) if self.suites else Suite(0, self.tasks)

    def compared_with(self, environment: str) -> str:
        """Release that the candidate is compared with on one environment."""
        return self.references.get(environment, self.reference)
