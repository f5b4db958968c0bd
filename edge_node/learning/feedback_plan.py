"""What a round that learns from preferences, scored groups or thumbs adds to its plan.

In: settings, and the sizes of scored groups. Out: a FeedbackPlan, part of a RoundPlan
(`records.py`), and where steps and rate of each method stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edge_node.learning.policy import Method
from edge_node.settings import FeedbackSettings, GrpoSettings, LearningSettings
from protos.manifest import Document

PASSES = 4
"""How often a scored round meets each group at most: the policy moves away from the one that
answered.
"""


class FeedbackPlan(Document):
    """What a round of preferences, scored groups or thumbs depends on beyond the rest."""

    method: Literal["dpo", "scored", "kto"]
    batch: int
    beta: float
    stale: int = 0
    """Scored groups since the last such round that another release answered; they are dropped."""


@dataclass(frozen=True)
class GroupSizes:
    """count: groups of the active release. samples: answers of the largest. tokens: of the longest
    answer. stale: new groups of other releases.
    """

    count: int
    samples: int
    tokens: int
    stale: int

    def steps(self, grpo: GrpoSettings) -> int:
        """Optimizer steps of a round."""
        return min(grpo.steps, -(-PASSES * self.count // grpo.prompts))


def feedback_plan(
    settings: FeedbackSettings, method: Method, groups: GroupSizes | None
) -> FeedbackPlan | None:
    """None for a method that has none. `groups`: of a scored round."""
    if method in ("sft", "grpo"):
        return None
    return FeedbackPlan(
        method=method,
        batch=settings.batch,
        beta=settings.beta,
        stale=groups.stale if groups else 0,
    )


def of_method(
    settings: LearningSettings, method: Method
) -> LearningSettings | FeedbackSettings | GrpoSettings:
    """Where steps and rate of a round stand."""
    if method == "sft":
        return settings
    return settings.feedback if method in ("dpo", "kto") else settings.grpo
