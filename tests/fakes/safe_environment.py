"""An environment of two tool calls: look a code up, then type it. An ordinary plug-in.

`how`: in which way it fails, if at all.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any, Literal

from edge_node.environments import Task

SECRET = "the secret recipe of a customer"


class Safe:
    episodes = 0

    def __init__(self, how: str = "") -> None:
        self._how = how
        self._open = False

    def tasks(
        self, split: Literal["train", "held_out"], *, count: int, seed: int
    ) -> Sequence[Task]:
        first = (0 if split == "train" else 500) + 50 * seed
        return [
            Task(
                f"safe-{number}",
                [{"role": "user", "content": f"open safe {number}"}],
                {"number": number, "code": str(7 * number)},
            )
            for number in range(first, first + min(count, 50))
        ]

    def reset(self, number: int, code: str) -> str | None:
        self._number, self._code = number, code
        self._open = self._how == "open already"
        if self._how == "reset raises":
            raise RuntimeError(SECRET)
        if self._how == "differs":
            Safe.episodes += 1
            return str(Safe.episodes)
        return None if self._how == "silent" else "!"

    def look_up(self, safe: int) -> dict[str, Any]:
        """Find the code of a safe.

        Args:
            safe: Its number.
        """
        if safe != self._number:
            raise LookupError(f"no safe {safe}")
        return {"code": self._code}

    def type_code(self, code: str) -> str:
        """Type a code.

        Args:
            code: What is typed.
        """
        if self._how == "hangs":
            time.sleep(3600)
        if self._how == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        self._open = code == self._code
        return "open" if self._open else "shut"

    def get_reward(self) -> Any:
        known = {"none": None, "high": 1.5, "text": "1", "nan": float("nan")}
        if self._how in known:
            return known[self._how]
        if self._how == "reward raises":
            raise RuntimeError(SECRET)
        return float(self._open)

    def feedback(self) -> str:
        return "" if self._open else "it is shut"

    def _helper(self) -> None:
        """No tool."""


class Dynamic:
    """Its tools are known at run time."""

    def __init__(self, how: str = "") -> None:
        self._how = how
        self._said: list[Any] = []

    def tasks(self, split: str, *, count: int, seed: int) -> Sequence[Task]:
        return Safe().tasks(split, count=count, seed=seed)  # type: ignore[arg-type]

    def reset(self, **data: Any) -> None:
        pass

    def tools(self) -> Any:
        schema = {"type": "function", "function": {"name": "say", "parameters": {}}}
        if self._how == "raises":
            raise RuntimeError(SECRET)
        return {"none": [], "no name": [{}], "twice": [schema, schema]}.get(self._how, [schema])

    def call_tool(self, name: str, arguments: dict[str, Any]) -> str:
        self._said.append(arguments)
        return f"{name} {len(self._said)}"

    def get_reward(self) -> float:
        return 1.0 if self._said else 0.0

    def close(self) -> None:
        self._said.append("closed")
