"""Episodes in a worker: apart from each other, and every way to fail."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from edge_node.environments import EnvironmentProcess, Episodes, Task
from edge_node.environments.checking import check_environment
from edge_node.errors import EnvironmentFault, SettingsError
from edge_node.settings import EnvironmentSpec

FAKES = "tests.fakes.safe_environment"
SECRET = "the secret recipe of a customer"


def spec(how: str = "", kind: str = "Safe", **limits: Any) -> EnvironmentSpec:
    return EnvironmentSpec(name="safe", factory=f"{FAKES}:{kind}", options={"how": how}, **limits)


def episodes_of(process: EnvironmentProcess) -> Episodes:
    environment = process.environment()
    assert isinstance(environment, Episodes)
    return environment


def test_episodes_are_played_at_once_and_do_not_meet() -> None:
    with EnvironmentProcess(spec()) as process:
        assert process.start() == "tools"
        episodes = episodes_of(process)
        assert [tool["function"]["name"] for tool in episodes.schemas] == ["look_up", "type_code"]
        first, second = episodes.tasks("held_out", count=2, seed=0)
        one, two = episodes.start(first), episodes.start(second)
        assert one.opening == "!"
        assert one.call("look_up", {"safe": 500}) == '{"code": "3500"}'
        assert one.call("look_up", {"safe": 501}) == "LookupError: no safe 501"
        assert one.call("type_code", {"code": "3500"}) == "open"
        assert two.call("type_code", {"code": "3500"}) == "shut"
        assert two.call("nothing", {}).startswith("LookupError: no tool is named nothing")
        assert (one.reward(), two.reward(), two.feedback()) == (1.0, 0.0, "it is shut")
        one.close()
        one.close()
        with pytest.raises(EnvironmentFault, match="lost this episode"):
            one.reward()
        assert two.reward() == 0


def test_tools_that_are_known_at_run_time() -> None:
    with EnvironmentProcess(spec(kind="Dynamic")) as process:
        episodes = episodes_of(process)
        (task,) = episodes.tasks("train", count=1, seed=0)
        episode = episodes.start(task)
        assert episode.opening is None
        assert episode.call("say", {"a": 1}) == "say 1"
        assert episode.reward() == 1


@pytest.mark.parametrize(
    ("how", "expected", "raised"),
    [
        ("reset raises", r"raised RuntimeError in reset \(safe_environment.py:\d+\)", True),
        ("high", "broke its contract in get_reward: it has reward 1.5", False),
        ("hangs", "gave no answer to call within 1 s", False),
    ],
)
def test_a_failure_outside_a_tools_words_is_a_fault(
    how: str, expected: str, raised: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with EnvironmentProcess(spec(how, call_timeout_s=1)) as process:
        episodes = episodes_of(process)
        (task,) = episodes.tasks("train", count=1, seed=0)
        with pytest.raises(EnvironmentFault, match=expected) as caught:
            _play(episodes, task)
    assert caught.value.raised == raised
    told = str(caught.value) + caplog.text + repr([vars(record) for record in caplog.records])
    assert "secret" not in told


def _play(episodes: Episodes, task: Task) -> None:
    episode = episodes.start(task)
    episode.call("type_code", {"code": SECRET})
    episode.reward()


def test_an_episode_ends_with_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_node.environments.process.FIRST_PAUSE_S", 0.0)
    with EnvironmentProcess(spec("crashes")) as process:
        episodes = episodes_of(process)
        (task,) = episodes.tasks("train", count=1, seed=0)
        one, two = episodes.start(task), episodes.start(task)
        with pytest.raises(EnvironmentFault, match="was killed in call"):
            one.call("type_code", {"code": "1"})
        with pytest.raises(EnvironmentFault, match="lost this episode: its worker was started"):
            two.reward()
        assert episodes.start(task).reward() == 0


def test_a_tool_without_a_schema_is_a_mistake_in_the_settings() -> None:
    with (
        EnvironmentProcess(spec("no name", kind="Dynamic")) as process,
        pytest.raises(
            SettingsError, match=r"'safe': factory .*has a tool whose schema has no name"
        ),
    ):
        process.start()


def test_the_check_plays_an_episode_of_each_task() -> None:
    found = check_environment(spec(), 10)
    assert found.wrong == []
    assert (found.kind, found.tools) == ("tools", ["look_up", "type_code"])
    assert found.scores == (0.0, 0.0)
