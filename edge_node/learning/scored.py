"""A round on groups of answers that a client scored: GRPO without rollouts of our own.

In: a RoundPlan with its GrpoPlan, groups with the log-probabilities that vLLM had when it answered.
Out: as in grpo.py, which trains. Each group is one task, its answers are the rollouts, its scores
the rewards: so advantages are within the group, and the policy's way from the one that answered is
corrected for (truncated importance sampling, token by token). Importing this module loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

from edge_node.environments import Environment, Outcome, Task
from edge_node.experience import Group
from edge_node.learning.grpo import train_grpo
from edge_node.learning.plans import RoundPlan
from edge_node.learning.rewards import Exercise
from edge_node.learning.rollouts import Answer, Ask
from edge_node.learning.training import TrainedRound
from edge_node.learning.workplace import Workplace


@dataclass(frozen=True)
class _Known:
    """Stands where grpo.py expects vLLM and a verifier: everything was answered and scored."""

    groups: Sequence[Group]
    samples: int

    async def sample(self, model: str, asks: Sequence[Ask]) -> Sequence[Sequence[Answer | None]]:
        """The seed of each ask is the number of its group. None fills it up to the largest one's
        size.
        """
        return [self._answers(self.groups[ask.seed]) for ask in asks]

    def verify(self, task: Task, answer: str) -> Outcome:
        """`answer` is the number of one in the group."""
        return Outcome(False, self.groups[int(task.id)].scores[int(answer)], "", None)

    def _answers(self, group: Group) -> list[Answer | None]:
        answers: list[Answer | None] = [
            Answer(list(ids), list(logprobs), str(number))
            for number, (ids, logprobs) in enumerate(
                zip(group.answers, group.logprobs, strict=True)
            )
        ]
        return answers + [None] * (self.samples - len(answers))


def train_scored(plan: RoundPlan, place: Workplace, *, groups: Sequence[Group]) -> TrainedRound:
    """Train on `groups`, at least one, in turns. Errors are those of `train_grpo`."""
    assert plan.grpo is not None
    assert plan.feedback is not None
    known = _Known(groups, plan.grpo.samples)
    exercises = [
        Exercise(
            "scored",
            cast(Environment, known),
            Task(str(number), []),
            groups[number].prompt_ids,
            seed=number,
        )
        for number in (turn % len(groups) for turn in range(plan.steps * plan.grpo.prompts))
    ]
    trained = train_grpo(
        plan,
        place,
        exercises=exercises,
        rollouts=known,
        publish=lambda step, increment: "",
    )
    counted = {"scored": 1.0, "groups_stale": float(plan.feedback.stale)}
    metrics = {name: value for name, value in trained.metrics.items() if name != "grpo"}
    return replace(trained, metrics=counted | metrics)
