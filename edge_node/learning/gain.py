"""What a grpo round has to gain: is the policy better than its start on tasks it has not seen?

In: two served versions, held-out tasks. Out: a Gain, from the scores of both on the same tasks,
answered greedily through the serving path; a task with tools is played to its end, and an agent is
run, as rollouts are. A task is left out when the verifier raises for either answer, or a run fails.
It keeps a node from sending what its own verifiers do not like. The local gate (`gate.py`) comes
after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from edge_node.agent_runs import AgentRuns
from edge_node.environments import Task
from edge_node.episodes import sampler
from edge_node.errors import EnvironmentFault
from edge_node.learning.records import RoundImpossible
from edge_node.learning.rewards import CORRECT_IT, Exercise, reward
from edge_node.learning.rollouts import beating
from edge_node.releases.asking import ask
from edge_node.serving import ControlClient
from lorikeet.together import together

TASKS = 32
"""Held-out tasks of a comparison, over all environments."""
AT_ONCE = 16


@dataclass(frozen=True)
class Gain:
    """start, policy: mean scores. better, worse: tasks that the policy did better, or worse."""

    tasks: int
    better: int
    worse: int
    start: float
    policy: float

    @property
    def is_one(self) -> bool:
        """Whether the mean of the paired differences is above zero."""
        return self.policy > self.start

    def metrics(self) -> dict[str, float]:
        return {
            "held_out_tasks": float(self.tasks),
            "held_out_better": float(self.better),
            "held_out_worse": float(self.worse),
            "held_out_start": self.start,
            "held_out_policy": self.policy,
        }


def of_scores(start: Sequence[float | None], policy: Sequence[float | None]) -> Gain:
    """Scores of the same tasks in the same order; raises RoundImpossible when no pair is known."""
    pairs = [
        (before, after)
        for before, after in zip(start, policy, strict=True)
        if before is not None and after is not None
    ]
    if not pairs:
        raise RoundImpossible(
            f"No answer to {len(start)} held-out tasks got a score: every verifier raised.",
            CORRECT_IT,
        )
    return Gain(
        tasks=len(pairs),
        better=sum(after > before for before, after in pairs),
        worse=sum(after < before for before, after in pairs),
        start=sum(before for before, _ in pairs) / len(pairs),
        policy=sum(after for _, after in pairs) / len(pairs),
    )


async def measure(
    control: ControlClient,
    tasks: Sequence[Exercise],
    *,
    start: str,
    policy: str,
    max_tokens: int,
    beat: Callable[[], None] = lambda: None,
) -> Gain:
    """The gain of the served version `policy` over `start`.

    Raises:
        ServingError: a request failed.
        EnvironmentFault: an environment hung or crashed; of agents only when no task is left.
        RoundImpossible: no task could be judged.
    """
    gate = asyncio.Semaphore(AT_ONCE)
    faults: list[EnvironmentFault] = []
    async with control.requests(AT_ONCE) as client, beating(control, beat):

        async def score(model: str, exercise: Exercise) -> float | None:
            async with gate:
                if isinstance(exercise.verifier, AgentRuns):
                    try:
                        end = await exercise.verifier.run(
                            exercise.task,
                            model,
                            seed=0,
                            temperature=0.0,
                            max_answer_tokens=max_tokens,
                        )
                    except EnvironmentFault as fault:
                        faults.append(fault)
                        return None
                    beat()
                    return end.reward
                if exercise.rules is not None:
                    what = f"task {exercise.task.id}"
                    way = await exercise.play(
                        sampler(client, model, temperature=0, seed="", what=what)
                    )
                    beat()
                    return None if way is None else way.reward
                answer = await _greedy(client, model, exercise.task, max_tokens)
            beat()
            score = await asyncio.to_thread(reward, exercise, answer)
            beat()
            return score

        scores = await together(
            score(model, exercise) for model in (start, policy) for exercise in tasks
        )
    ended = [fault for fault in faults if not fault.raised]
    if ended and all(score is None for score in scores):
        raise ended[0]
    return of_scores(scores[: len(tasks)], scores[len(tasks) :])


async def _greedy(client: httpx.AsyncClient, model: str, task: Task, max_tokens: int) -> str:
    body = {
        "model": model,
        "messages": task.messages,
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    document = await ask(client, "/v1/chat/completions", body, f"task {task.id}")
    return str(document["choices"][0]["message"]["content"] or "")
