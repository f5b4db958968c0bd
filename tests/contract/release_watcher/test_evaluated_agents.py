"""Agents in an evaluation: a run has a session on its version, and passes with a whole reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from edge_node.agent_runs import AT_ONCE
from edge_node.environments import AgentRun, Split, Task
from edge_node.errors import EnvironmentFault, ServingError
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.serving import SessionAccess, Turn
from edge_node.settings import EnvironmentSpec
from tests.contract.release_watcher.endpoint import GREEDY, counts
from tests.fakes.endpoint import at

GOOD = {"new": 1.0, "old": 0.9}


class Here:
    """Agents in this process: `new` does every task, and `old` only nearly."""

    def __init__(self, fails: Any = None) -> None:
        self._fails = fails
        self.batches: list[int] = []

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return [Task(f"{split}/{number}", []) for number in range(count)]

    def run_all(self, runs: Sequence[AgentRun]) -> list[float | EnvironmentFault | None]:
        self.batches.append(len(runs))
        return [self._fails(run) if self._fails else GOOD[run.model] for run in runs]


class Control:
    """Opens sessions, and knows which are open."""

    def __init__(self, lost: str = "") -> None:
        self._lost = lost
        self.opened: list[dict[str, Any]] = []
        self.open = 0

    async def open_session(self, model: str, **limits: Any) -> SessionAccess:
        self.opened.append({"model": model} | limits)
        self.open += 1
        assert self.open <= AT_ONCE
        return SessionAccess("http://127.0.0.1:1/v1", f"key-{len(self.opened)}", model)

    async def take_session(self, api_key: str) -> list[Turn]:
        self.open -= 1
        if api_key == self._lost:
            raise ServingError("its time is over")
        return []


def evaluator(control: Control, agents: Here) -> Evaluator:
    spec = EnvironmentSpec(name="desk", factory="x:Y", run_timeout_s=10, call_timeout_s=5)
    environments = {"desk": (spec, lambda: agents)}
    return Evaluator(at("http://127.0.0.1:1"), environments, 0, 40, control=control)  # type: ignore[arg-type]


async def test_a_run_passes_when_its_reward_is_whole() -> None:
    control = Control()
    result = await evaluator(control, Here()).compare("desk", "new", "old", 0, 3, GREEDY)
    assert counts(result) == (0, 0, 3, 0)
    assert control.open == 0
    assert {one["temperature"] for one in control.opened} == {0.0}
    assert {(one["lasts_s"], one["max_answer_tokens"]) for one in control.opened} == {(75.0, 40)}
    seeds = {model: [] for model in ("new", "old")}  # type: ignore[var-annotated]
    for one in control.opened:
        seeds[one["model"]].append(one["seed"])
    assert sorted(seeds["new"]) == sorted(seeds["old"])


async def test_runs_of_both_versions_go_at_once_up_to_a_bound() -> None:
    agents = Here()
    await evaluator(Control(), agents).compare("desk", "new", "old", 0, 20, GREEDY)
    assert sum(agents.batches) == 40
    assert max(agents.batches) == AT_ONCE
    assert len(agents.batches) < 6


async def test_a_run_that_vllm_lost_is_no_lost_skill() -> None:
    with pytest.raises(ServingError, match="lost the session"):
        await evaluator(Control("key-1"), Here()).compare("desk", "new", "old", 0, 2, GREEDY)


async def test_attempts_are_sampled() -> None:
    control = Control()
    await evaluator(control, Here()).compare("desk", "new", "old", 0, 2, Sampling(2, 0.8))
    assert {one["temperature"] for one in control.opened} == {0.8}
    assert len([one for one in control.opened if one["model"] == "new"]) == 4


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda run: None, "'desk' gave no reward for a held-out task"),
        (lambda run: EnvironmentFault("desk", "It raised KeyError."), "It raised KeyError"),
    ],
)
async def test_a_run_that_fails_costs_the_result_and_is_no_loss(fails: Any, expected: str) -> None:
    control = Control()
    with pytest.raises(EnvironmentFault, match=expected):
        await evaluator(control, Here(fails)).compare("desk", "new", "old", 0, 2, GREEDY)
