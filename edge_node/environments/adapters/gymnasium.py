"""An environment of Gymnasium (https://gymnasium.farama.org) as an environment with one tool, step.

In: the id of an environment, names of its actions. Out: a task for each start that looks different;
its return as the reward. Guarantees: a hash of the opening text decides a task's split, so no text
is in both. Works with every package that registers environments with Gymnasium, and shows the
model what `render` says in text ("ansi"), or else the observation. Needs the package gymnasium.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from edge_node.environments.contract import Split, Task

DRY_STARTS = 200
"""An environment whose starts look like known ones so many times in a row has no more."""
COLOURED = re.compile(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", re.DOTALL)
COLOURS = ("gray", "red", "green", "yellow", "blue", "magenta", "cyan", "white")
Count = Literal["sum", "last"]


class Gymnasium:
    """One environment; every node with the same options has the same tasks."""

    def __init__(
        self,
        env_id: str,
        config: Mapping[str, Any] | None = None,
        prompt: str = "",
        actions: Sequence[str] = (),
        imports: Sequence[str] = (),
        count: Count = "sum",
        lowest: float = 0.0,
        highest: float = 1.0,
    ) -> None:
        """Make the environment.

        Args:
            env_id: as `gymnasium.make` takes it, e.g. `FrozenLake-v1`.
            config: keyword arguments of `gymnasium.make`. An episode that is not over is worth 0,
                so let `max_episode_steps` fit the turns that the model has.
            prompt: what the model is told first; the opening text follows.
            actions: names of the actions of a discrete environment, in their order. Without names
                the model gives a number, and for other kinds of environments JSON.
            imports: modules that register the environment.
            count: the return is the sum of all rewards, or the last one.
            lowest: the return that is worth 0.
            highest: the return that is worth 1, which passes.

        Raises:
            ModuleNotFoundError: gymnasium, or one of `imports`, is not installed.
            ValueError: an option that does not fit.
        """
        if count not in get_args(Count):
            raise ValueError(f"count is {count!r}; expected {' or '.join(get_args(Count))}")
        if not lowest < highest:
            raise ValueError(f"lowest is {lowest}; expected less than highest, {highest}")
        gym = _import("gymnasium", "pip install gymnasium")
        for name in imports:
            _import(name, "the package that has it")
        self._count, self._lowest, self._highest = count, lowest, highest
        self._prompt = prompt or f"Act in {env_id}, one step at a time, until it is over."
        config = dict(config or {})
        self._env = gym.make(env_id, **config)
        modes = self._env.metadata.get("render_modes") or ()
        if "ansi" in modes and "render_mode" not in config:
            self._env.close()
            self._env = gym.make(env_id, **config, render_mode="ansi")
        self._names = list(actions)
        space = self._env.action_space
        if self._names and (not hasattr(space, "n") or len(self._names) != space.n):
            raise ValueError(f"actions has {len(self._names)} names; expected one each of {space}")
        self._rewards: list[float] = []
        self._over = self._broken = False

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` starts with distinct texts, fewer where the environment has no more."""
        found: dict[str, Task] = {}
        for start in self._starts(split, seed, found):
            if len(found) == count:
                break
            text = f"{self._prompt}\n\n{self._begin(start)}"
            digest = hashlib.sha256(text.encode()).hexdigest()
            if (int(digest[-1], 16) % 2 == 0) == (split == "train"):
                messages = [{"role": "user", "content": text}]
                found.setdefault(text, Task(digest[:16], messages, {"start": start}))
        return list(found.values())

    def reset(self, start: int) -> str | None:
        """Start the episode; the task has its opening text."""
        self._begin(start)
        return None

    def tools(self) -> list[dict[str, Any]]:
        """The one tool, `step`."""
        space = self._env.action_space
        if self._names:
            action: dict[str, Any] = {"type": "string", "enum": self._names}
        elif hasattr(space, "n"):
            least = int(getattr(space, "start", 0))
            action = {"type": "integer", "minimum": least, "maximum": least + int(space.n) - 1}
        else:
            action = {"type": "string"}
        action["description"] = "What to do." if self._names else f"An action of {space}."
        parameters = {"type": "object", "properties": {"action": action}, "required": ["action"]}
        description = "Do one action, and see what comes of it."
        function = {"name": "step", "description": description, "parameters": parameters}
        return [{"type": "function", "function": function}]

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> str:
        """One step; raises ValueError for an action that there is not, or after the end."""
        if self._over:
            raise ValueError("the episode is over")
        action = self._action(arguments.get("action"))
        try:
            observation, reward, ended, cut, _ = self._env.step(action)
            text = self._text(observation)
        except Exception:
            self._over = self._broken = True
            raise
        self._rewards.append(float(reward))
        self._over = bool(ended or cut)
        return f"{text}\nReward: {float(reward):g}." + "\nThe episode is over." * self._over

    def get_reward(self) -> float | None:
        """The return between `lowest` and `highest`, as 0 to 1; 0 before the end.

        None when the environment raised.
        """
        if self._broken:
            return None
        if not self._over:
            return 0.0
        total = math.fsum(self._rewards) if self._count == "sum" else self._rewards[-1]
        if not math.isfinite(total):
            return None
        return min(1.0, max(0.0, (total - self._lowest) / (self._highest - self._lowest)))

    def close(self) -> None:
        """Give back what the environment holds."""
        self._env.close()

    def _starts(self, split: Split, seed: int, found: Mapping[str, Task]) -> Iterator[int]:
        """Seeds without end, until `found` does not grow any more."""
        number = dry = 0
        while dry < DRY_STARTS:
            before = len(found)
            text = f"{split}/{seed}/{number}"
            yield int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2
            dry = dry + 1 if len(found) == before else 0
            number += 1

    def _begin(self, start: int) -> str:
        observation, _ = self._env.reset(seed=start)
        self._rewards, self._over = [], False
        return self._text(observation)

    def _text(self, observation: Any) -> str:
        if self._env.render_mode == "ansi":
            return COLOURED.sub(_named, str(self._env.render())).strip()
        return str(observation)

    def _action(self, given: Any) -> Any:
        space = self._env.action_space
        if self._names:
            if given not in self._names:
                raise ValueError(f"action is {given!r}; expected one of {', '.join(self._names)}")
            return self._names.index(given) + int(getattr(space, "start", 0))
        action = given
        if isinstance(given, str) and not space.contains(given):
            action = json.loads(given)
        if isinstance(action, list):
            action = importlib.import_module("numpy").asarray(action, dtype=space.dtype)
        if not space.contains(action):
            raise ValueError(f"action is {given!r}; expected one of {space}")
        return action


def _named(coloured: re.Match[str]) -> str:
    """`<red: S>`: the colour of a terminal may say where the agent is."""
    codes = [int(code) for code in coloured[1].split(";")]
    names = [COLOURS[code % 10] for code in codes if code in (*range(30, 38), *range(40, 48))]
    return f"<{' '.join(names)}: {coloured[2]}>"


def _import(name: str, how: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the package {error.name} is not installed; expected what `{how}` installs"
            if error.name == "gymnasium"
            else f"the module {error.name} is not installed; expected {how}"
        ) from error
