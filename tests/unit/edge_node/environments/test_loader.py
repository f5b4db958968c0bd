from __future__ import annotations

from typing import Any

import pytest

from edge_node.environments import Environment, TextEnvironment, ToolEnvironment
from edge_node.environments.loader import load_environment
from edge_node.errors import SettingsError
from edge_node.settings import EnvironmentSpec
from tests.fakes.safe_environment import Safe
from tests.fakes.text_environment import Texts
from tests.fakes.word_environment import NextWord


def spec(factory: str, **options: Any) -> EnvironmentSpec:
    return EnvironmentSpec(name="acme", factory=factory, options=options)


def test_module_and_class_with_options() -> None:
    environment = load_environment(spec("tests.fakes.word_environment:NextWord", first=10, last=20))
    assert isinstance(environment, NextWord)
    assert isinstance(environment, Environment)
    assert {task.data["number"] for task in environment.tasks("train", count=99, seed=0)} == {
        10,
        12,
        14,
        16,
        18,
    }


def test_a_mistake_names_the_options_without_their_values() -> None:
    with pytest.raises(SettingsError, match="it to accept the options last, password") as caught:
        load_environment(spec("tests.fakes.word_environment:NextWord", last=9, password="hunter2"))
    assert "hunter2" not in str(caught.value)


class Both(NextWord, Texts):
    pass


class Judged(Safe, NextWord):
    pass


def test_an_environment_with_tools() -> None:
    environment = load_environment(spec("tests.fakes.safe_environment:Safe"))
    assert isinstance(environment, ToolEnvironment)


def test_an_environment_of_texts() -> None:
    environment = load_environment(spec("tests.fakes.text_environment:Texts", number=3))
    assert isinstance(environment, TextEnvironment)
    documents = environment.documents("held_out", count=99, seed=0)
    assert len({document.text for document in documents}) == 3


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    point = EntryPoint("words", "tests.fakes.word_environment:NextWord", "lorikeet.environments")
    monkeypatch.setattr("edge_node.environments.loader.entry_points", lambda group: [point])
    assert isinstance(load_environment(spec("words")), NextWord)


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        ("no.such.module:Thing", {}, "cannot be imported"),
        ("tests.fakes.word_environment:Nothing", {}, "has no 'Nothing'"),
        ("tests.fakes.word_environment:NextWord", {"colour": "red"}, "colour"),
        ("tests.fakes.word_environment:__name__", {}, "is a str"),
        ("builtins:dict", {}, "without tasks, verify, reference_answer, and without documents"),
        (f"{__name__}:Both", {}, "of 2 kinds: Environment and TextEnvironment"),
        (f"{__name__}:Judged", {}, "of 2 kinds: Environment and ToolEnvironment"),
        ("unknown-entry", {}, "not an installed entry point"),
    ],
)
def test_every_mistake_names_environment_and_factory(
    factory: str, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_environment(spec(factory, **options))
    text = str(caught.value)
    assert expected in text
    assert "'acme'" in text
    assert factory in text
    assert "EDGE_ENVIRONMENTS" in text
