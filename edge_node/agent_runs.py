"""Runs of whole agents against the node's own vLLM, several at once and never more than a bound.

In: an environment of agents; tasks, the name of a served version, how it is sampled. Out: per run
its reward, and its turns in token ids. Guarantees: nothing of it is stored as experience; a run's
turns are those of its own session; the same version, task and seed give the same first answer. A
vLLM that lost a run is a ServingError, and an agent that failed is an EnvironmentFault of its own
run: neither is ever a bad mark. Rounds, the local gate and the evaluation for central all use it.

An environment's worker takes one call after the other. So runs that are asked for at about the same
time go to it in one call, and those that come meanwhile in the next one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edge_node.environments import AgentRun, Agents, Split, Task, in_own_thread
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.serving import ControlClient, SessionAccess, Turn
from edge_node.settings import EnvironmentSpec

AT_ONCE = 16
"""Most runs of an environment at once. An evaluation, a round, and what a killed learner left open
have room in vLLM's sessions together (edge_node/serving/sessions.py).
"""
ROOM = "agents"
"""Name under which rounds report an environment of agents that they go on without."""
GATHER_S = 0.05
"""How long the first of some runs waits for the others."""
SESSION_MARGIN_S = 60.0
"""How much longer than its run a session lasts: an agent that blocks is ended that late."""


async def at_once() -> None:
    """Waits for nobody."""


@dataclass(frozen=True)
class RunEnd:
    """What came of a run. reward: 0 to 1; None: the environment knows none."""

    reward: float | None
    turns: Sequence[Turn]


@dataclass(frozen=True)
class _Asked:
    task: Task
    model: str
    sampling: dict[str, Any]
    wait: Callable[[], Awaitable[None]]
    end: asyncio.Future[RunEnd]

    def fail(self, error: Exception) -> None:
        if not self.end.done():
            self.end.set_exception(error)

    def settle(self, reward: float | EnvironmentFault | None, turns: Sequence[Turn] | None) -> None:
        if turns is None:
            self.fail(ServingError("vLLM lost the session of an agent's run; nothing is known."))
        elif isinstance(reward, EnvironmentFault):
            self.fail(reward)
        elif not self.end.done():
            self.end.set_result(RunEnd(reward, turns))


class AgentRuns:
    """One environment of agents; one event loop at a time."""

    def __init__(
        self, control: ControlClient, spec: EnvironmentSpec, agents: Agents, most: int = AT_ONCE
    ) -> None:
        """most: runs at once, if that is fewer than AT_ONCE."""
        self._control = control
        self._agents = agents
        self._most = min(most, AT_ONCE)
        self._lasts_s = spec.run_timeout_s + spec.call_timeout_s + SESSION_MARGIN_S
        self._asked: deque[_Asked] = deque()
        self._going: asyncio.Task[None] | None = None

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """As those of Agents."""
        return self._agents.tasks(split, count=count, seed=seed)

    async def run(
        self,
        task: Task,
        model: str,
        *,
        seed: int,
        temperature: float,
        max_answer_tokens: int | None,
        wait: Callable[[], Awaitable[None]] = at_once,
    ) -> RunEnd:
        """What comes of one run on the served version `model`.

        wait: returns when runs may start, because the users have been served.

        Raises:
            EnvironmentFault: the agent raised, took too long, or blocked or crashed its process.
            ServingError: vLLM opens no session, or lost the run's.
        """
        sampling = {
            "seed": seed,
            "temperature": temperature,
            "max_answer_tokens": max_answer_tokens,
        }
        end: asyncio.Future[RunEnd] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(task, model, sampling, wait, end))
        if self._going is None or self._going.done():
            self._going = asyncio.create_task(self._go())
        return await end

    async def _go(self) -> None:
        await asyncio.sleep(GATHER_S)
        while batch := self._next():
            try:
                await batch[0].wait()
                await self._run(batch)
            except Exception as error:  # one that blocked or crashed, or ours: all must hear of it
                for one in batch:
                    one.fail(error)
            finally:
                for one in batch:
                    one.end.cancel()

    def _next(self) -> list[_Asked]:
        batch: list[_Asked] = []
        while self._asked and len(batch) < self._most:
            one = self._asked.popleft()
            if not one.end.done():  # whoever asked was cancelled
                batch.append(one)
        return batch

    async def _run(self, batch: Sequence[_Asked]) -> None:
        opened: list[tuple[_Asked, SessionAccess]] = []
        rewards: list[float | EnvironmentFault | None] = []
        try:
            for one in batch:
                try:
                    access = await self._control.open_session(
                        one.model, lasts_s=self._lasts_s, **one.sampling
                    )
                except ServingError as error:
                    one.fail(error)
                else:
                    opened.append((one, access))
            if opened:
                rewards += await in_own_thread(
                    self._agents.run_all,
                    [
                        AgentRun(one.task, access.base_url, access.api_key, access.model)
                        for one, access in opened
                    ],
                )
        finally:
            turns = [await self._take(access) for _, access in opened]
        for (one, _), reward, told in zip(opened, rewards, turns, strict=True):
            one.settle(reward, told)

    async def _take(self, access: SessionAccess) -> Sequence[Turn] | None:
        try:
            return await self._control.take_session(access.api_key)
        except ServingError:
            return None
