"""Tools of an environment as its worker sees them: schemas, calls, rewards."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from edge_node.environments import Task, ToolEnvironment
from edge_node.environments import tools as tools_module
from edge_node.environments.tools import OpenEpisodes, tool_schemas
from edge_node.environments.wire import ContractBroken
from tests.fakes.safe_environment import Dynamic, Safe

TASK = Task("t", [], {"number": 3, "code": "21"})


def opened(how: str = "") -> OpenEpisodes:
    episodes = OpenEpisodes(lambda: Safe(how), ["look_up", "type_code"])
    episodes.reset(0, TASK)
    return episodes


def test_the_tools_are_the_public_methods_in_their_order() -> None:
    assert isinstance(Safe(), ToolEnvironment)
    first, second = tool_schemas(Safe())
    assert first == {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Find the code of a safe.",
            "parameters": {
                "type": "object",
                "properties": {"safe": {"type": "integer", "description": "Its number."}},
                "required": ["safe"],
            },
        },
    }
    assert second["function"]["name"] == "type_code"


class Silent(Safe):
    def look(self, x: int) -> str:
        return ""


class Untyped(Safe):
    def look(self, x) -> str:  # type: ignore[no-untyped-def]
        """Look.

        Args:
            x: where
        """
        return ""


class Async(Safe):
    async def look(self) -> str:
        """Look."""
        return ""


class Toolless:
    tasks = reset = get_reward = lambda self: None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (Silent(), "has a tool look without a schema .*no docstring"),
        (Untyped(), "has a tool look without a schema .*type hint"),
        (Async(), "has an async tool look"),
        (Toolless(), "has no tool; expected a public method"),
        (Dynamic("none"), "has no tool"),
        (Dynamic("no name"), "has a tool whose schema has no name"),
        (Dynamic("twice"), "has two tools of one name: say, say"),
        (Dynamic("raises"), "raised RuntimeError in tools; expected JSON schemas"),
    ],
)
def test_tools_that_cannot_be_described_are_a_broken_contract(
    environment: Any, expected: str
) -> None:
    with pytest.raises(ContractBroken, match=expected) as caught:
        tool_schemas(environment)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        ("look_up", {"safe": 3}, '{"code": "21"}'),
        ("look_up", {"safe": 4}, "LookupError: no safe 4"),
        ("type_code", {"code": "21"}, "open"),
        ("type_code", {"number": 1}, "TypeError: .*unexpected keyword argument 'number'"),
        ("get_reward", {}, "LookupError: no tool is named get_reward; there are look_up, type_"),
        ("_helper", {}, "LookupError: no tool is named _helper"),
    ],
)
def test_what_a_call_gives_or_raises_is_told_to_the_model(
    tool: str, arguments: dict[str, Any], told: str
) -> None:
    text = opened().call(0, tool, arguments)
    assert text == told or re.match(told, text)


def test_half_of_a_surrogate_pair_that_comes_back_is_no_fault() -> None:
    episodes = OpenEpisodes(Dynamic, ["say"])
    episodes.reset(0, TASK)
    assert episodes.call(0, "say\ud83d", {}).startswith("LookupError: no tool is named say?")


def test_a_reward_is_a_number_or_none() -> None:
    episodes = opened()
    assert (episodes.reward(0), episodes.feedback(0)) == (0.0, "it is shut")
    episodes.call(0, "type_code", {"code": "21"})
    assert (episodes.reward(0), episodes.feedback(0)) == (1.0, "")
    assert opened("none").reward(0) is None
    for how, expected in (("high", "reward 1.5"), ("text", "a str"), ("nan", f"{math.nan}")):
        with pytest.raises(ContractBroken, match=expected):
            opened(how).reward(0)


def test_episodes_are_apart_bounded_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools_module, "MAX_OPEN", 2)
    made: list[Dynamic] = []

    def make() -> Dynamic:
        made.append(Dynamic())
        return made[-1]

    episodes = OpenEpisodes(make, ["say"])
    for number in (7, 8):
        assert episodes.reset(number, TASK) is None
    assert [episodes.call(number, "say", {"a": 1}) for number in (7, 7, 8)] == [
        "say 1", "say 2", "say 1",
    ]  # fmt: skip
    with pytest.raises(ContractBroken, match="more than 2 episodes at once"):
        episodes.reset(9, TASK)
    episodes.end(7)
    assert made[0]._said[-1] == "closed"
    assert 7 not in episodes
    episodes.reset(9, TASK)


def test_data_that_reset_cannot_take_is_a_broken_contract() -> None:
    with pytest.raises(ContractBroken, match="no dictionary of texts to values"):
        OpenEpisodes(Safe, []).reset(0, Task("t", [], {1: 2}))  # type: ignore[dict-item]
