"""Does an agent keep its contract, whatever the model says?

In: an environment of agents in its worker. Out: the rewards of some runs against an endpoint
without a model, and what is wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_node.environments.contract import AgentRun, Agents, Task
from edge_node.environments.stub_endpoint import stub_endpoint
from edge_node.errors import EnvironmentFault

RUNS = 4
"""Tasks that are run with each answer."""


@dataclass
class Tried:
    """known: runs that knew a reward. failed: what the others said."""

    known: list[tuple[Task, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    runs: int = 0
    run_ms: float = 0.0

    @property
    def rewards(self) -> list[float]:
        return [reward for _, reward in self.known]


def try_agents(agents: Agents, tasks: Sequence[Task], answers: Sequence[str]) -> Tried:
    """Runs of the first RUNS tasks, with a model that gives one of `answers` to everything.

    Raises EnvironmentFault when the agent hangs or crashes.
    """
    tried, began = Tried(), time.perf_counter()
    for answer in answers:
        with stub_endpoint(answer) as url:
            runs = [AgentRun(task, url, "none", "stub") for task in tasks[:RUNS]]
            for run, reward in zip(runs, agents.run_all(runs), strict=True):
                tried.runs += 1
                if isinstance(reward, EnvironmentFault):
                    tried.failed.append(str(reward))
                elif reward is not None:
                    tried.known.append((run.task, reward))
    tried.run_ms = 1000 * (time.perf_counter() - began) / max(1, tried.runs)
    return tried
