"""What verifiers say of sampled answers.

In: tasks in training order, answers. Out: a reward for each answer: the outcome's score, or the
episode's reward; None where none is known. Guarantees: a fault of the environment or of vLLM is
never a bad mark; no task and no answer is logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_node.agent_runs import AgentRuns
from edge_node.environments import Environment, Episodes, Task
from edge_node.episodes import Rules, Sample, Trajectory, run_episode
from edge_node.errors import EnvironmentFault
from edge_node.experience.comparisons import SAME
from edge_node.learning.trajectories import drawn

log = logging.getLogger(__name__)

CORRECT_IT = (
    "See `a verifier raised` in the log of `edge-node serve`, and correct the environment. The "
    "node tries again after EDGE_LEARNING__SUPERSEDE_AFTER_S."
)
"""What to do when no answer gets a reward."""


@dataclass(frozen=True)
class Exercise:
    """A train task of one environment, as vLLM gets it. seed: of its samples.

    rules: of one with tools, whose prompt may still grow by what `reset` says. An agent makes its
    prompts itself, so there are no `prompt_ids`.
    """

    environment: str
    verifier: Environment | Episodes | AgentRuns
    task: Task
    prompt_ids: Sequence[int]
    seed: int
    rules: Rules | None = None

    @property
    def is_played(self) -> bool:
        """Whether what is judged is no answer but an episode or a run, when it has ended."""
        return self.rules is not None or isinstance(self.verifier, AgentRuns)

    async def run(self, model: str, seed: int, **how: Any) -> Trajectory | None:
        """One run of an agent; None: there is nothing to learn from it.

        how, errors: those of `AgentRuns.run`.
        """
        assert isinstance(self.verifier, AgentRuns)
        return drawn(await self.verifier.run(self.task, model, seed=seed, **how), seed)

    async def play(self, sample: Sample) -> Trajectory | None:
        """An episode of a task with tools; None: the environment raised.

        Raises ServingError, and EnvironmentFault when the environment hung or crashed.
        """
        assert self.rules is not None
        assert isinstance(self.verifier, Episodes)
        try:
            return await run_episode(self.rules, self.verifier, self.task, sample)
        except EnvironmentFault as error:
            if not error.raised:
                raise
            _leave_out(self, error)
            return None


def reward(exercise: Exercise, answer: str | None) -> float | None:
    """None: there is no answer, or the verifier raised, or its score is no finite number.

    Raises EnvironmentFault when the environment hung or crashed: it would do so for all answers.
    """
    if answer is None:
        return None
    assert not isinstance(exercise.verifier, Episodes | AgentRuns)
    try:
        score = float(exercise.verifier.verify(exercise.task, answer).score)
    except Exception as error:  # a plug-in may raise anything
        if isinstance(error, EnvironmentFault) and not error.raised:
            raise
        _leave_out(exercise, error)
        return None
    return score if math.isfinite(score) else None


def _leave_out(exercise: Exercise, error: Exception) -> None:
    log.warning(
        "a verifier raised; the answer is left out",
        extra={"environment": exercise.environment, "why": type(error).__name__},
    )


def without_variance(rewards: Sequence[float | None], samples: int) -> list[bool]:
    """Of each group of `samples` rewards, whether it teaches nothing: all known ones are equal, or
    none is.
    """
    groups = [rewards[first : first + samples] for first in range(0, len(rewards), samples)]
    return [_is_flat([one for one in group if one is not None]) for group in groups]


def _is_flat(known: Sequence[float]) -> bool:
    return not known or max(known) - min(known) < SAME


class Judge:
    """TRL's reward function: rewards in the order of the answers, and counts for its log."""

    __name__ = "verifier"

    def __init__(
        self,
        exercises: Sequence[Exercise],
        samples: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """beat: called after each verdict; each may take minutes, and a step has many."""
        self._exercises = exercises
        self._samples = samples
        self._beat = beat
        self.teaches: list[bool] = []
        """Of each answer that was judged last, whether it teaches something."""

    def __call__(
        self,
        prompts: Sequence[str],
        answer: Sequence[str | None],
        episode_reward: Sequence[float | None],
        log_metric: Callable[[str, float], None],
        **_: object,
    ) -> list[float | None]:
        """`prompts`: each the number of an exercise, as text; the others belong to it.

        One with tools, or of agents, was judged when it ended: that is `episode_reward`.
        """
        rewards = []
        for number, text, judged in zip(prompts, answer, episode_reward, strict=True):
            exercise = self._exercises[int(number)]
            rewards.append(judged if exercise.is_played else reward(exercise, text))
            self._beat()
        flat = without_variance(rewards, self._samples)
        self.teaches = [
            one is not None and not flat[number // self._samples]
            for number, one in enumerate(rewards)
        ]
        log_metric("groups_skipped", sum(flat))
        log_metric("unscored", sum(one is None for one in rewards))
        return rewards
