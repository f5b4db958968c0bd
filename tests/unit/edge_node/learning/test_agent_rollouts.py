"""Runs of agents in the learner: what they sampled, and what a fault costs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edge_node.environments import AgentRun, Split, Task
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.learning.agent_rollouts import AgentRollouts, RunAsk, RunResult
from edge_node.learning.trajectories import Trajectory
from edge_node.serving import SessionAccess, Turn

FAULT = EnvironmentFault("desk", "Environment 'desk' raised KeyError in run.", raised=True)


class Control:
    """Sessions whose turns are `turns`, by the number of the session; others have one."""

    def __init__(self, turns: dict[int, list[Turn] | ServingError] | None = None) -> None:
        self._turns = turns or {}
        self.opened: list[dict[str, Any]] = []
        self.open: set[str] = set()

    async def open_session(self, model: str, **limits: Any) -> SessionAccess:
        key = str(len(self.opened))
        self.opened.append({"model": model} | limits)
        self.open.add(key)
        return SessionAccess("http://127.0.0.1:1/v1", key, model)

    async def take_session(self, api_key: str) -> list[Turn]:
        self.open.remove(api_key)
        turns = self._turns.get(int(api_key), [Turn([1], [2, 3], [-0.1, -0.2])])
        if isinstance(turns, ServingError):
            raise turns
        return turns

    async def state(self) -> None:
        """It answers."""


class Here:
    """Agents in this process."""

    def __init__(self, reward: Callable[[AgentRun], float | EnvironmentFault | None]) -> None:
        self._reward = reward
        self.batches: list[int] = []

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return []

    def run_all(self, runs: Sequence[AgentRun]) -> list[float | EnvironmentFault | None]:
        self.batches.append(len(runs))
        return [self._reward(run) for run in runs]


async def run(control: Control, agents: Here, count: int = 3, **options: Any) -> Any:
    rollouts = AgentRollouts(
        control,  # type: ignore[arg-type]
        temperature=1.0,
        max_answer_tokens=8,
        run_timeout_s=10,
        call_timeout_s=5,
        **options,
    )
    asks = [RunAsk(Task(str(number), []), seed=number) for number in range(count)]
    return await rollouts.run("desk", agents, "policy/r1@2", asks)


async def test_each_run_has_its_own_sessions_sequences_and_reward() -> None:
    turns = [Turn([1], [2], [-0.1]), Turn([1, 2, 7], [4], [-0.4])]
    control = Control({1: turns})
    results = await run(control, Here(lambda run: int(run.api_key) / 2), 3)
    assert results[0] == RunResult([Trajectory([1], [2, 3], [1, 1], [-0.1, -0.2])], 0.0)
    assert results[1] == RunResult([Trajectory([1], [2, 7, 4], [1, 0, 1], [-0.1, 0.0, -0.4])], 0.5)
    assert results[2].reward == 1.0
    assert [one["seed"] for one in control.opened] == [0, 1, 2]
    assert {one["model"] for one in control.opened} == {"policy/r1@2"}
    assert all(one["lasts_s"] > 15 for one in control.opened)
    assert not control.open


async def test_runs_go_in_batches_and_users_first() -> None:
    waits: list[int] = []

    async def wait() -> None:
        waits.append(1)

    agents = Here(lambda run: 1.0)
    assert len(await run(Control(), agents, 5, in_flight=2, wait=wait)) == 5
    assert agents.batches == [2, 2, 1]
    assert len(waits) == 3


async def test_nothing_is_learnt_where_nothing_is_known(caplog: pytest.LogCaptureFixture) -> None:
    image = Turn([1], [2], [-0.1], text_only=False)
    control = Control({2: [], 3: [image], 4: ServingError("lost")})
    rewards: dict[str, float | EnvironmentFault | None] = {"0": None, "1": FAULT}
    caplog.set_level(logging.WARNING)
    results = await run(control, Here(lambda run: rewards.get(run.api_key, 1.0)), 6)
    assert [result is None for result in results] == [True] * 5 + [False]
    assert not control.open
    assert any("runs of agents failed" in record.message for record in caplog.records)


async def test_a_fault_of_all_runs_is_raised() -> None:
    with pytest.raises(EnvironmentFault, match="raised KeyError"):
        await run(Control(), Here(lambda run: FAULT))


async def test_an_agent_that_crashes_leaves_no_session_open() -> None:
    def crash(run: AgentRun) -> float:
        raise EnvironmentFault("desk", "Environment 'desk' ended in run_all.")

    control = Control()
    with pytest.raises(EnvironmentFault, match="ended in run_all"):
        await run(control, Here(crash))
    assert not control.open
