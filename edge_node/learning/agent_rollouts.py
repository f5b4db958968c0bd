"""Runs of whole agents against the node's own vLLM, and what they sampled.

In: tasks of an environment of agents, the name of a served version. Out: per run its sequences and
its reward, or None where there is nothing to learn. Guarantees: nothing of it is stored as
experience; a run's tokens are those of its own session; the same version, task and seed give the
same first answer. A fault of the agent, of the environment or of vLLM is never a bad mark.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from edge_node.environments import AgentRun, Agents, Task, in_own_thread
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.learning.rollouts import beating
from edge_node.learning.trajectories import Trajectory, join_turns
from edge_node.serving import ControlClient, SessionAccess, Turn

log = logging.getLogger(__name__)

SESSION_MARGIN_S = 60.0
"""How much longer than its run a session lasts: an agent that blocks is ended that late."""


@dataclass(frozen=True)
class RunAsk:
    """One run. seed: of its answers."""

    task: Task
    seed: int


@dataclass(frozen=True)
class RunResult:
    """trajectories: one or more, which share `reward` (0 to 1)."""

    trajectories: list[Trajectory]
    reward: float


async def _at_once() -> None:
    """Waits for nobody."""


@dataclass(frozen=True)
class AgentRollouts:
    """Runs agents, `in_flight` at a time.

    run_timeout_s, call_timeout_s: of the environment's item in EDGE_ENVIRONMENTS.
    wait: called before each batch of runs; returns when the users have been served.
    beat: called while vLLM answers.
    """

    control: ControlClient
    temperature: float
    max_answer_tokens: int
    run_timeout_s: float
    call_timeout_s: float
    in_flight: int = 16
    wait: Callable[[], Awaitable[None]] = _at_once
    beat: Callable[[], None] = lambda: None

    async def run(
        self, name: str, agents: Agents, model: str, asks: Sequence[RunAsk]
    ) -> list[RunResult | None]:
        """A result for each of `asks`, in their order. name: of the environment.

        None: the agent raised or took too long, it knows no reward, it asked the model nothing that
        can be learnt from, or vLLM lost its session.

        Raises:
            EnvironmentFault: an agent blocked or crashed its process, or every run failed.
            ServingError: vLLM opens no session.
        """
        results: list[RunResult | None] = []
        faults: list[EnvironmentFault] = []
        async with beating(self.control, self.beat):
            for first in range(0, len(asks), self.in_flight):
                await self.wait()
                batch = asks[first : first + self.in_flight]
                results += await self._batch(agents, model, batch, faults)
        if faults:
            log.warning(
                "runs of agents failed; they are left out",
                extra={"environment": name, "failed": len(faults), "first": str(faults[0])},
            )
            if len(faults) == len(asks):
                raise faults[0]
        return results

    async def _batch(
        self, agents: Agents, model: str, asks: Sequence[RunAsk], faults: list[EnvironmentFault]
    ) -> list[RunResult | None]:
        sessions = [await self._open(model, ask) for ask in asks]
        runs = [
            AgentRun(ask.task, session.base_url, session.api_key, session.model)
            for ask, session in zip(asks, sessions, strict=True)
        ]
        try:
            rewards = await in_own_thread(agents.run_all, runs)
        finally:
            turns = [await self._take(session) for session in sessions]
        faults += [reward for reward in rewards if isinstance(reward, EnvironmentFault)]
        return [_result(*pair) for pair in zip(turns, rewards, strict=True)]

    async def _open(self, model: str, ask: RunAsk) -> SessionAccess:
        return await self.control.open_session(
            model,
            seed=ask.seed,
            temperature=self.temperature,
            max_answer_tokens=self.max_answer_tokens,
            lasts_s=self.run_timeout_s + self.call_timeout_s + SESSION_MARGIN_S,
        )

    async def _take(self, session: SessionAccess) -> list[Turn]:
        try:
            return await self.control.take_session(session.api_key)
        except ServingError as error:
            log.warning("a session of an agent is lost", extra={"why": str(error)})
            return []


def _result(turns: Sequence[Turn], reward: float | EnvironmentFault | None) -> RunResult | None:
    if not isinstance(reward, float) or not turns:
        return None
    if not all(turn.text_only for turn in turns):
        return None
    return RunResult(join_turns(turns), reward)
