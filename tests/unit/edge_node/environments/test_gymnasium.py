"""The adapter of Gymnasium, on a package that stands for it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from edge_node.environments import Task, ToolEnvironment
from edge_node.environments.adapters.gymnasium import Gymnasium

SPACE = SimpleNamespace(n=2, start=0, contains=lambda action: action in (0, 1))


class Walk:
    """From a start of 0 to 39 to 40, by steps of +1 or -1; the last step is worth 1."""

    action_space = SPACE
    metadata: dict[str, Any] = {"render_modes": ["human", "ansi"]}  # noqa: RUF012

    def __init__(self, starts: int = 40, fails: bool = False, render_mode: str | None = None):
        self._starts, self._fails, self.render_mode = starts, fails, render_mode
        self._at, self.closed = 0, False

    def reset(self, *, seed: int) -> tuple[int, dict[str, Any]]:
        self._at = seed % self._starts
        return self._at, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if self._fails:
            raise RuntimeError("no power")
        self._at += 1 if action else -1
        return self._at, float(self._at >= 40), self._at >= 40, self._at < 0, {}

    def render(self) -> str:
        return f"you are at \x1b[41m{self._at}\x1b[0m"

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("gymnasium")
    module.make = lambda name, **config: {"Walk-v0": Walk}[name](**config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gymnasium", module)


def made(**options: Any) -> Gymnasium:
    return Gymnasium("Walk-v0", actions=["back", "on"], **options)


def start_at(place: int) -> Gymnasium:
    environment = made()
    environment.reset(start=place)
    return environment


def texts(tasks: Any) -> list[str]:
    return [task.messages[0]["content"] for task in tasks]


def test_tasks_are_distinct_starts_that_are_in_one_split() -> None:
    assert isinstance(made(), ToolEnvironment)
    train = made().tasks("train", count=40, seed=0)
    held_out = made().tasks("held_out", count=40, seed=0)
    assert not set(texts(train)) & set(texts(held_out))
    assert len(train) + len(held_out) == 40, "all places there are, each once"
    assert texts(made().tasks("train", count=5, seed=0)) == texts(train)[:5]
    assert texts(train)[0].endswith(">")
    assert "you are at <red: " in texts(train)[0]


def test_an_episode_starts_where_its_task_says() -> None:
    task: Task
    (task,) = made().tasks("train", count=1, seed=3)
    environment = made()
    assert environment.reset(**task.data) is None
    place = int(task.messages[0]["content"].rpartition("<red: ")[2].rstrip(">"))
    assert f"<red: {place + 1}>" in environment.call_tool("step", {"action": "on"})


def test_the_end_is_told_and_rewarded() -> None:
    environment = start_at(39)
    assert environment.get_reward() == 0.0, "it is not over"
    told = environment.call_tool("step", {"action": "on"})
    assert told == "you are at <red: 40>\nReward: 1.\nThe episode is over."
    assert environment.get_reward() == 1.0
    with pytest.raises(ValueError, match="the episode is over"):
        environment.call_tool("step", {"action": "on"})
    lost = start_at(0)
    lost.call_tool("step", {"action": "back"})
    assert lost.get_reward() == 0.0


def test_an_action_that_there_is_not_is_said_and_changes_nothing() -> None:
    environment = start_at(39)
    with pytest.raises(ValueError, match="action is 'jump'; expected one of back, on"):
        environment.call_tool("step", {"action": "jump"})
    environment.call_tool("step", {"action": "on"})
    assert environment.get_reward() == 1.0


def test_without_names_the_model_gives_numbers() -> None:
    environment = Gymnasium("Walk-v0")
    (schema,) = environment.tools()
    action = schema["function"]["parameters"]["properties"]["action"]
    assert (action["minimum"], action["maximum"]) == (0, 1)
    environment.reset(start=39)
    with pytest.raises(ValueError, match="action is 7"):
        environment.call_tool("step", {"action": 7})
    environment.call_tool("step", {"action": "1"})
    assert environment.get_reward() == 1.0


def test_a_broken_environment_gives_no_reward() -> None:
    environment = made(config={"fails": True})
    environment.reset(start=39)
    with pytest.raises(RuntimeError):
        environment.call_tool("step", {"action": "on"})
    assert environment.get_reward() is None


def test_returns_are_brought_to_0_and_1() -> None:
    environment = made(lowest=-1.0, highest=3.0)
    environment.reset(start=39)
    assert environment.get_reward() == 0.0, "it is not over"
    environment.call_tool("step", {"action": "on"})
    assert environment.get_reward() == 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"actions": ["on"]}, "actions has 1 names"),
        ({"count": "mean"}, "count is 'mean'; expected sum or last"),
        ({"lowest": 1.0}, "lowest is 1.0; expected less than highest"),
    ],
)
def test_an_option_that_does_not_fit_is_said(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Gymnasium("Walk-v0", **options)


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match="expected what `pip install gymnasium` installs"):
        made()
