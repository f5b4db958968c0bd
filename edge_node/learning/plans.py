"""What a round is: its start, its data and its hyper-parameters.

In: settings, a release, what the node has to learn from. Out: a RoundPlan. Guarantees: a plan fixes
all that a round's update depends on, so a resumed round makes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from pydantic import Field

from edge_node.learning.anchors import anchors_digest
from edge_node.learning.feedback_plan import FeedbackPlan, GroupSizes, feedback_plan, of_method
from edge_node.learning.policy import Method
from edge_node.settings import LearningSettings
from protos.encoding import Encoding
from protos.manifest import Digest, Document, ReleaseManifest


class WarmPlan(Document):
    """The supervised steps that a grpo round begins with (`warm.py`)."""

    steps: int
    learning_rate: float
    cursor: int
    """Experiences up to this feedback."""


class DistilPlan(Document):
    """What an sft round by self-distillation depends on beyond the rest (`distilling.py`)."""

    max_answer_tokens: int


class GrpoPlan(Document):
    """What a round of reinforcement learning depends on beyond the rest of its plan."""

    environments: list[str]
    """Names of those that are asked, in turns."""
    prompts: int
    samples: int
    max_answer_tokens: int
    temperature: float
    beta: float
    max_turns: int = 8
    """Most answers in an episode with tools."""
    warm: WarmPlan | None = Field(default=None, exclude_if=lambda warm: warm is None)


class RoundPlan(Document):
    """One round: its start, its data and its hyper-parameters."""

    schema_version: Literal[1] = 1
    number: int
    round_id: str
    release_id: str
    label: str
    payload_digest: str
    release_rank: int
    """Rank of the release's prefix on disk, where the round starts; its own rank when whole."""
    cursor: int
    """Experiences up to this feedback."""
    seed: int
    rank: int
    alpha: float
    steps: int
    batch_own: int
    batch_hard: int
    batch_anchor: int
    anchor_pool: int
    anchor_seed: int
    anchors: Digest | None = None
    """Digest of the base's own samples (`anchors.py`); None: anchor environments, if any."""
    kl: float = 1.0
    """Weight of the KL divergence from the base on them."""
    learning_rate: float
    max_examples: int
    checkpoint_steps: int
    created_at: str
    # A plan that was written before there were these has their defaults.
    dtype: str = "float32"
    """"auto" means what the base's size makes of it."""
    target_modules: str | list[str] = "all-linear"
    encoding: Encoding = Field(default="float32", exclude_if=lambda encoding: encoding == "float32")
    """How the increment travels."""
    batch_replay: int = Field(default=0, exclude_if=lambda count: count == 0)
    """Own examples of a batch that are drawn from all earlier releases (experience/replay.py)."""
    deleted: int = Field(default=0, exclude_if=lambda count: count == 0)
    """Interactions, and feedback up to the cursor, that had been deleted when it was planned."""
    grpo: GrpoPlan | None = Field(default=None, exclude_if=lambda grpo: grpo is None)
    """Only of a grpo or scored round; without it and `feedback` the round is sft, as every round of
    earlier software.
    """
    feedback: FeedbackPlan | None = Field(
        default=None, exclude_if=lambda feedback: feedback is None
    )
    """Only of a dpo, scored or kto round."""

    distil: DistilPlan | None = Field(default=None, exclude_if=lambda distil: distil is None)
    """Only of an sft round by self-distillation."""

    @property
    def method(self) -> Method:
        if self.feedback is not None:
            return self.feedback.method
        return "sft" if self.grpo is None else "grpo"

    @property
    def known_up_to(self) -> int:
        """The last feedback that it may learn from."""
        return self.grpo.warm.cursor if self.grpo and self.grpo.warm else self.cursor

    @property
    def takes_experience(self) -> bool:
        """Whether its update may hold what was captured."""
        return self.method != "grpo" or (self.grpo is not None and self.grpo.warm is not None)

    def age_s(self) -> float:
        """Seconds since the round was planned, by the wall clock; never negative."""
        return max(
            0.0, (datetime.now(UTC) - datetime.fromisoformat(self.created_at)).total_seconds()
        )


def plan_round(
    settings: LearningSettings,
    *,
    number: int,
    node_id: str,
    release: ReleaseManifest,
    prefix_rank: int | None = None,
    cursor: int,
    max_rank: int | None,
    method: Method = "sft",
    deleted: int = 0,
    explored: Sequence[str] = (),
    groups: GroupSizes | None = None,
    encoding: Encoding = "float32",
    warm_cursor: int | None = None,
) -> RoundPlan:
    """The plan of round `number` from `release`; setting, node and number give the seed.

    `max_rank` is what central's offer says, `encoding` is one that it names, `deleted` is what the
    experience says. `explored` names the environments of a grpo round, `groups` the sizes of a
    scored one. `warm_cursor` is the newest feedback, where a grpo round is to begin with a warm
    start. Raises SettingsError when there are no anchors where the settings say.
    """
    distils = method == "sft" and settings.sdft.enabled
    chosen, decay = of_method(settings, method), settings.round_decay**release.version
    seed = int.from_bytes(
        hashlib.sha256(f"{settings.seed}/{node_id}/{number}".encode()).digest()[:4], "big"
    )
    return RoundPlan(
        number=number,
        round_id=f"r{number:06d}-{release.label}",
        release_id=release.digest,
        label=release.label,
        payload_digest=release.payload.digest_sha256,
        release_rank=release.rank if prefix_rank is None else prefix_rank,
        cursor=cursor,
        seed=seed,
        rank=min(settings.rank, max_rank or settings.rank),
        alpha=settings.alpha,
        steps=chosen.steps if groups is None else groups.steps(settings.grpo),
        batch_own=settings.batch_own,
        batch_hard=min(settings.batch_hard, settings.batch_own),
        batch_replay=settings.batch_replay if method == "sft" else 0,
        deleted=deleted if method != "grpo" or warm_cursor is not None else 0,
        batch_anchor=settings.batch_anchor,
        anchor_pool=settings.anchor_pool,
        anchor_seed=settings.seed,
        anchors=anchors_digest(settings.anchors)
        if settings.anchors is not None and settings.batch_anchor
        else None,
        kl=settings.kl,
        learning_rate=(settings.sdft if distils else chosen).learning_rate * decay,
        max_examples=settings.max_examples,
        checkpoint_steps=settings.checkpoint_steps,
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        dtype=settings.dtype,
        target_modules=settings.target_modules,
        encoding=encoding,
        grpo=_grpo_plan(settings, explored, groups, warm_cursor, decay)
        if chosen is settings.grpo
        else None,
        feedback=feedback_plan(settings.feedback, method, groups),
        distil=DistilPlan(max_answer_tokens=settings.sdft.max_answer_tokens) if distils else None,
    )


def _grpo_plan(
    settings: LearningSettings,
    explored: Sequence[str],
    groups: GroupSizes | None,
    warm_cursor: int | None,
    decay: float,
) -> GrpoPlan:
    grpo = settings.grpo
    return GrpoPlan(
        environments=list(explored),
        prompts=grpo.prompts,
        samples=groups.samples if groups else grpo.samples,
        max_answer_tokens=groups.tokens if groups else grpo.max_answer_tokens,
        # A client chose the temperature of its group, and vLLM's log-probabilities are those at 1.
        temperature=1.0 if groups else grpo.temperature,
        beta=grpo.beta,
        max_turns=grpo.max_turns,
        warm=WarmPlan(
            steps=grpo.warm_steps,
            learning_rate=settings.learning_rate * decay,
            cursor=warm_cursor,
        )
        if warm_cursor is not None and grpo.warm_steps
        else None,
    )
