"""What a node does at its start with environments that do not load."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.environments import EnvironmentProcess
from edge_node.errors import SettingsError
from edge_node.main import load_environments
from edge_node.problems import Problems
from edge_node.settings import EnvironmentSpec
from tests.fakes.broken_environments import made


async def test_one_that_crashes_is_a_problem_and_the_others_are_loaded(tmp_path: Path) -> None:
    with made("Loading", "crash") as broken, made("OwnKind", name="good") as good:
        assert await load_environments([broken, good], Problems(tmp_path))
        assert good.pid is not None
    (problem,) = Problems(tmp_path).current()
    assert problem.room == "environments"
    assert "Environment 'acme' ended in load (killed by SIGSEGV)" in problem.text
    assert "edge-node environments check acme" in problem.next_step


async def test_one_that_does_not_exist_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    spec = EnvironmentSpec(name="acme", factory="no.such.module:Thing")
    with (
        EnvironmentProcess(spec) as process,
        pytest.raises(SettingsError, match="cannot be imported"),
    ):
        await load_environments([process], Problems(tmp_path))
