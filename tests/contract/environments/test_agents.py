"""Agents in their worker: rewards, and every way in which a run can fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from edge_node.environments import AgentRun, Agents, EnvironmentProcess, Split, Task
from edge_node.environments.checking import check_environment
from edge_node.environments.checking_agents import try_agents
from edge_node.environments.stub_endpoint import stub_endpoint
from edge_node.errors import EnvironmentFault
from edge_node.settings import EnvironmentSpec
from tests.fakes.agents import SECRET


def spec(kind: str, limits: dict[str, Any] | None = None, **options: Any) -> EnvironmentSpec:
    factory = f"tests.fakes.agents:{kind}"
    return EnvironmentSpec(name="acme", factory=factory, options=options, **(limits or {}))


def run(process: EnvironmentProcess, url: str, count: int = 2) -> Any:
    agents = process.environment()
    assert isinstance(agents, Agents)
    tasks = agents.tasks("train", count=count, seed=0)
    return agents.run_all([AgentRun(task, url, "key", "model") for task in tasks])


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_asks_the_endpoint_and_is_rewarded(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # a proxy that leads nowhere
    with (
        stub_endpoint("a" * 25) as url,
        EnvironmentProcess(spec("Asking", stream=stream)) as process,
    ):
        assert process.start() == "agents"
        assert run(process, url) == [0.25, 0.25]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", r"raised KeyError in run \(agents.py:\d+\)"),
        ("wait", "did not end its run within 0.5 s"),
    ],
)
def test_a_run_that_fails_costs_itself_alone(how: str, expected: str) -> None:
    with EnvironmentProcess(spec("Going", {"run_timeout_s": 0.5}, how=how)) as process:
        good, bad = run(process, "")
        assert good == 0.5
        assert isinstance(bad, EnvironmentFault)
        assert bad.raised
        assert str(bad).startswith("Environment 'acme' ")
        assert expected.split(r" \(")[0] in str(bad)
        assert SECRET not in str(bad)
        worker = process.pid
        assert run(process, "", count=1) == [0.5]
        assert process.pid == worker


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("block", "gave no answer to run_all within 1 s"),
        ("crash", r"ended in run_all \(killed by SIGSEGV\)"),
        ("high", "has reward 1.5; expected 0 to 1"),
        ("text", "has a str for reward"),
    ],
)
def test_an_agent_that_takes_its_process_along_is_a_fault(how: str, expected: str) -> None:
    limits = {"run_timeout_s": 0.5, "call_timeout_s": 0.5}
    with EnvironmentProcess(spec("Going", limits, how=how)) as process:
        with pytest.raises(EnvironmentFault, match=expected) as caught:
            run(process, "")
        assert not caught.value.raised
        assert SECRET not in str(caught.value)


def test_an_unknown_reward_is_none() -> None:
    with EnvironmentProcess(spec("Going", how="none")) as process:
        assert run(process, "") == [0.5, None]


def test_the_check_runs_agents_without_a_model() -> None:
    found = check_environment(spec("Asking"), 4)
    assert found.kind == "agents"
    assert [wrong.what for wrong in found.wrong] == [
        "4 of 8 runs pass with a model that answers nothing of use."
    ]
    assert found.scores == (0.0, 1.0)


def test_the_check_says_that_runs_fail() -> None:
    class Failing:
        def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
            return [Task(str(number), []) for number in range(count)]

        def run_all(self, runs: Sequence[AgentRun]) -> list[float | EnvironmentFault | None]:
            return [0.5, EnvironmentFault("acme", "It raised KeyError.", raised=True)]

    tried = try_agents(Failing(), Failing().tasks("train", count=2, seed=0), ["", "a"])
    assert (tried.runs, tried.rewards) == (4, [0.5, 0.5])
    assert tried.failed == ["It raised KeyError."] * 2
