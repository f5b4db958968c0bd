"""Runs of agents: how many go at once, and what a fault costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from edge_node import agent_runs
from edge_node.agent_runs import AgentRuns, RunEnd
from edge_node.environments import AgentRun, Split, Task
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.serving import SessionAccess, Turn
from edge_node.settings import EnvironmentSpec

FAULT = EnvironmentFault("desk", "Environment 'desk' raised KeyError in run.", raised=True)
CRASH = EnvironmentFault("desk", "Environment 'desk' ended in run_all.")
SPEC = EnvironmentSpec(name="desk", factory="x:Y", run_timeout_s=10, call_timeout_s=5)
Reward = float | EnvironmentFault | None


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_runs, "GATHER_S", 0.0)


class Control:
    """Sessions by number; each has one turn, and those of `lost` are gone."""

    def __init__(self, lost: Sequence[int] = (), refused: Sequence[int] = ()) -> None:
        self._lost, self._refused = lost, refused
        self.opened: list[dict[str, Any]] = []
        self.open: set[str] = set()

    async def open_session(self, model: str, **limits: Any) -> SessionAccess:
        number = len(self.opened)
        self.opened.append({"model": model} | limits)
        if number in self._refused:
            raise ServingError("64 sessions of agents are open")
        self.open.add(str(number))
        return SessionAccess("http://127.0.0.1:1/v1", str(number), model)

    async def take_session(self, api_key: str) -> list[Turn]:
        self.open.remove(api_key)
        if int(api_key) in self._lost:
            raise ServingError("This session is not open")
        return [Turn([1], [2, int(api_key)], [-0.1, -0.2])]


class Here:
    """Agents in this process."""

    def __init__(self, reward: Callable[[AgentRun], Reward]) -> None:
        self._reward = reward
        self.batches: list[int] = []

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return [Task(f"{split}/{seed}/{number}", []) for number in range(count)]

    def run_all(self, runs: Sequence[AgentRun]) -> list[Reward]:
        self.batches.append(len(runs))
        return [self._reward(run) for run in runs]


async def run(
    control: Control, agents: Here, count: int = 3, most: int = 16, **how: Any
) -> list[Any]:
    runs = AgentRuns(control, SPEC, agents, most)  # type: ignore[arg-type]

    async def one(number: int) -> RunEnd:
        return await runs.run(
            Task(str(number), []), "policy/r1@2", seed=number, temperature=1.0,
            max_answer_tokens=8, **how,
        )  # fmt: skip

    return await asyncio.gather(*map(one, range(count)), return_exceptions=True)


async def test_each_run_has_its_own_session_and_reward() -> None:
    control = Control()
    ends = await run(control, Here(lambda run: int(run.task.id) / 2))
    assert [end.reward for end in ends] == [0.0, 0.5, 1.0]
    assert [end.turns[0].answer_ids for end in ends] == [[2, 0], [2, 1], [2, 2]]
    assert [one["seed"] for one in control.opened] == [0, 1, 2]
    assert {one["model"] for one in control.opened} == {"policy/r1@2"}
    assert {(one["temperature"], one["max_answer_tokens"]) for one in control.opened} == {(1.0, 8)}
    assert all(one["lasts_s"] > 15 for one in control.opened)
    assert not control.open


@pytest.mark.parametrize(("most", "batches"), [(2, [2, 2, 1]), (1000, [5]), (1, [1] * 5)])
async def test_runs_go_at_once_up_to_a_bound_and_users_first(most: int, batches: list[int]) -> None:
    waits: list[int] = []

    async def wait() -> None:
        waits.append(1)

    agents = Here(lambda run: 1.0)
    assert len(await run(Control(), agents, 5, most, wait=wait)) == 5
    assert agents.batches == batches
    assert len(waits) == len(batches)


async def test_never_more_than_vllm_has_room_for() -> None:
    agents = Here(lambda run: 1.0)
    await run(Control(), agents, 40, 1000)
    assert agents.batches == [16, 16, 8]


async def test_a_run_that_fails_costs_itself_alone() -> None:
    rewards: dict[str, Reward] = {"0": None, "1": FAULT}
    none, fault, good = await run(Control(), Here(lambda run: rewards.get(run.task.id, 0.5)))
    assert none.reward is None
    assert fault is FAULT
    assert good.reward == 0.5


async def test_an_agent_that_crashes_costs_the_runs_beside_it_and_leaves_no_session_open() -> None:
    def crash(run: AgentRun) -> float:
        if run.task.id == "0":
            raise CRASH
        return 1.0

    control = Control()
    ends = await run(control, Here(crash), 4, 2)
    assert ends[:2] == [CRASH, CRASH]
    assert [end.reward for end in ends[2:]] == [1.0, 1.0]
    assert not control.open


async def test_what_vllm_lost_is_no_fault_of_the_agent() -> None:
    control = Control(lost=[0], refused=[1])
    lost, refused, good = await run(control, Here(lambda run: FAULT if run.api_key == "0" else 1.0))
    assert isinstance(lost, ServingError)
    assert isinstance(refused, ServingError)
    assert good.reward == 1.0


async def test_a_vllm_that_is_away_is_told_to_every_run() -> None:
    async def away() -> None:
        raise ServingError("vLLM does not answer")

    ends = await run(Control(), Here(lambda run: 1.0), 3, wait=away)
    assert {type(end) for end in ends} == {ServingError}


async def test_a_mistake_of_ours_leaves_nobody_waiting() -> None:
    def mistaken(run: AgentRun) -> float:
        raise KeyError

    ends = await asyncio.wait_for(run(Control(), Here(mistaken)), 10)
    assert {type(end) for end in ends} == {KeyError}


def test_another_event_loop_goes_on_after_one_that_was_ended() -> None:
    """As a round does: one loop for each step."""
    control, agents = Control(), Here(lambda run: 1.0)
    runs = AgentRuns(control, SPEC, agents)  # type: ignore[arg-type]
    how: dict[str, Any] = {"seed": 0, "temperature": 1.0, "max_answer_tokens": 8}

    async def given_up() -> None:
        going = asyncio.create_task(runs.run(Task("a", []), "m", **how))
        await asyncio.sleep(0)
        going.cancel()

    asyncio.run(given_up())
    end = asyncio.run(runs.run(Task("b", []), "m", **how))
    assert end.reward == 1.0
    assert agents.batches == [1]
