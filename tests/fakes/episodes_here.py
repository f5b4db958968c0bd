"""Episodes of the environment `Safe` in this process, as a worker has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from edge_node.environments import Episode, Task
from edge_node.environments.tools import OpenEpisodes, tool_schemas
from tests.fakes.safe_environment import Safe


class Here:
    """The contract's Episodes, without a worker."""

    def __init__(self, how: str = "") -> None:
        self.schemas: Sequence[dict[str, Any]] = tool_schemas(Safe())
        self._worker = OpenEpisodes(lambda: Safe(how), ["look_up", "type_code"])
        self.numbers = count()
        self.open: list[int] = []

    def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
        return Safe().tasks(split, count=count, seed=seed)

    def start(self, task: Task) -> Episode:
        return OneHere(self, self._worker, task)


class OneHere:
    def __init__(self, here: Here, worker: OpenEpisodes, task: Task) -> None:
        self._here, self._worker, self._number = here, worker, next(here.numbers)
        self.opening = worker.reset(self._number, task)
        here.open.append(self._number)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        return self._worker.call(self._number, tool, arguments)

    def reward(self) -> float | None:
        return self._worker.reward(self._number)

    def feedback(self) -> str | None:
        return self._worker.feedback(self._number)

    def close(self) -> None:
        self._worker.end(self._number)
        self._here.open.remove(self._number)
