"""The adapter of verifiers, with packages that stand for both of its interfaces."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_node.environments import AgentRun, Agents, EnvironmentProcess
from edge_node.environments.adapters.verifiers import Verifiers
from edge_node.errors import EnvironmentFault
from edge_node.settings import EnvironmentSpec

BEFORE = """
    import asyncio, os
    __version__ = "0.1.11"

    class ClientConfig:
        def __init__(self, api_base_url, api_key_var):
            self.url, self.key = api_base_url, os.environ[api_key_var]

    class Env:
        def __init__(self, rows):
            self._rows = rows

        def get_dataset(self):
            return [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(self._rows)]

        get_eval_dataset = get_dataset

        async def generate(self, inputs, client, model, independent_scoring):
            print("this is no reply")
            (row,) = inputs
            if client.key == "hang":
                await asyncio.sleep(3600)
            if client.key == "exit":
                os._exit(3)
            assert client.key in ("k0", "k1") and client.url == "http://x/v1" and model == "m"
            error = "it broke" if client.key == "k1" else None
            return {"outputs": [{"reward": 3.0, "error": error}]}

    def load_environment(name, rows=8):
        assert name == "acme"
        return Env(rows)
"""
SINCE = """
    from contextlib import asynccontextmanager
    from types import SimpleNamespace as Made

    def _task(n):
        return Made(key=str(n), data=Made(prompt_text=f"{n}?", system_prompt=None))

    class Env:
        def __init__(self, config):
            assert config == {"taskset": {"id": "acme", "size": 3}, "agent": 1}
            self.taskset = (_task(n) for n in range(8))
            self.serves = False

        @asynccontextmanager
        async def serving(self):
            self.serves = True
            yield

        async def run_episode(self, task, context):
            assert self.serves and context == {"model": "m", "client": ("http://x/v1", "k0")}
            return Made(ok=True, traces=[Made(reward=2.0), Made(reward=4.0)])

    def EvalClientConfig(base_url, api_key_var):
        import os
        return base_url, os.environ[api_key_var]

    def ModelContext(**given):
        return given

    def resolve_env_config(config):
        return config

    def load_environment(config):
        return Env(config)
"""


@pytest.fixture
def python(tmp_path: Path) -> Callable[[str, str], str]:
    """Makes an interpreter that has a package `verifiers`: its root, and its v1."""

    def make(root: str, v1: str = "") -> str:
        package = tmp_path / "packages" / "verifiers"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(textwrap.dedent(root))
        (package / "v1.py").write_text(textwrap.dedent(v1))
        code = (
            f"import runpy, sys; sys.path.insert(0, {str(package.parent)!r}); "
            "assert sys.argv.pop(1) == '-I'; runpy.run_path(sys.argv[1], run_name='__main__')"
        )
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -I -c "{code}" "$@"\n')
        program.chmod(0o755)
        return str(program)

    return make


def spec(python: str, config: dict[str, Any], **limits: Any) -> EnvironmentSpec:
    options = {"python": python, "name": "acme", "config": config, "lowest": 1.0, "highest": 5.0}
    factory = "edge_node.environments.adapters.verifiers:Verifiers"
    return EnvironmentSpec(name="vf", factory=factory, options=options, **limits)


def run(agents: Agents, *keys: str) -> Any:
    (task,) = agents.tasks("train", count=1, seed=0)
    return agents.run_all([AgentRun(task, "http://x/v1", key, "m") for key in keys])


def test_the_interface_before_0_4(python: Callable[[str, str], str]) -> None:
    interpreter = python(BEFORE, "")
    with EnvironmentProcess(spec(interpreter, {"rows": 20}, run_timeout_s=1)) as process:
        agents = process.environment()
        assert isinstance(agents, Agents)
        train = agents.tasks("train", count=20, seed=0)
        held_out = agents.tasks("held_out", count=20, seed=0)
        assert len({task.messages[0]["content"] for task in [*train, *held_out]}) == 20
        assert [t.id for t in agents.tasks("train", count=3, seed=0)] == [t.id for t in train[:3]]
        good, bad, late = run(agents, "k0", "k1", "hang")
        assert good == 0.5
        assert isinstance(bad, EnvironmentFault)
        assert isinstance(late, EnvironmentFault)
        assert "did not end its run within 1 s" in str(late)
        assert isinstance(run(agents, "exit")[0], EnvironmentFault)
        assert run(agents, "k0") == [0.5], "another process"


def test_the_interface_since_0_4(python: Callable[[str, str], str]) -> None:
    interpreter = python('__version__ = "0.4.0"', SINCE)
    config = {"taskset": {"size": 3}, "agent": 1}
    with EnvironmentProcess(spec(interpreter, config)) as process:
        agents = process.environment()
        assert isinstance(agents, Agents)
        assert len(agents.tasks("train", count=9, seed=0)) < 8
        assert run(agents, "k0") == [0.5]


def test_what_is_missing_is_said(python: Callable[[str, str], str]) -> None:
    with pytest.raises(ValueError, match=r"'/no/python', which cannot be started"):
        Verifiers("/no/python", "acme")
    with pytest.raises(ValueError, match=r"does not load 'acme' \(ModuleNotFoundError.*verifiers"):
        Verifiers(sys.executable, "acme")
