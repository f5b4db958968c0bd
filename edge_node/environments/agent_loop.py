"""Runs of an AgentEnvironment in its worker.

In: an environment, and what each run is given. Out: a reward for each, or how it failed, in words
that quote nothing. Guarantees: runs go on at once, in one event loop that lives as long as the
worker. One that raises or takes too long costs nothing but itself; one that blocks the loop is
ended by the node, with the worker.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from edge_node.environments.wire import open_task, plain_reward

LOOPBACK = "127.0.0.1"


class AgentLoop:
    """The event loop of a worker's agents."""

    def __init__(self, timeout_s: float, where: Callable[[Exception], str]) -> None:
        """timeout_s: of one run. where: file and line of an exception."""
        self._timeout_s = timeout_s
        self._where = where
        self._runner = asyncio.Runner()

    def run_all(self, environment: Any, given: Any) -> dict[str, Any]:
        """The worker's reply: a result for each of `given["runs"]`; raises ContractBroken."""
        _reach_directly(LOOPBACK)
        return {"value": self._runner.run(self._all(environment, given["runs"]))}

    async def _all(self, environment: Any, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._one(environment, run) for run in runs))

    async def _one(self, environment: Any, run: dict[str, Any]) -> dict[str, Any]:
        task = open_task(run.pop("task"))
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                reward = await environment.run(task, **run)
        except MemoryError:
            raise
        except Exception as error:  # a plug-in may raise anything
            if limit.expired():
                return {"raised": f"did not end its run within {self._timeout_s:g} s"}
            return {"raised": f"raised {type(error).__name__} in run{self._where(error)}"}
        return {"reward": plain_reward(reward)}


def _reach_directly(host: str) -> None:
    """The node's endpoint is on this machine, whatever proxy leads to others."""
    for name in ("NO_PROXY", "no_proxy"):
        listed = os.environ.get(name, "").split(",")
        if host not in listed:
            os.environ[name] = ",".join([*filter(None, listed), host])
