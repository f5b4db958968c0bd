"""The adapter of MCP against a real server process."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_node.environments import EnvironmentProcess, Episodes, ToolEnvironment
from edge_node.environments.adapters.mcp import McpServer
from edge_node.settings import EnvironmentSpec

COMMAND = [sys.executable, "-m", "tests.fakes.mcp_notes"]
HERE = {"PYTHONPATH": str(Path.cwd())}
STATE = {"tool": "read", "arguments": {"name": "b"}, "contains": "milk"}
CALL = {"tool": "read", "arguments": {"name": "a"}}


def line(text: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "files": {"a": "milk"}} | fields


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    both = line("Copy a to b.", split="train", expected={"calls": [CALL], "state": [STATE]})
    lines = [both, *(line(f"Read {n}.", expected={"calls": [CALL]}) for n in range(20))]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(json.dumps(one) for one in lines))
    return str(file)


@pytest.fixture
def notes(tasks: str) -> Iterator[McpServer]:
    server = McpServer(COMMAND, tasks, HERE)
    server.reset(json.loads(Path(tasks).read_text().splitlines()[0]))
    yield server
    server.close()


def test_a_task_is_right_when_its_calls_were_made_and_its_state_holds(notes: McpServer) -> None:
    assert isinstance(notes, ToolEnvironment)
    assert notes.get_reward() == 0.0
    assert notes.call_tool("read", {"name": "b"}) == "Error executing tool read", "there is no b"
    assert notes.call_tool("read", {"name": "a"}) == "milk"
    assert notes.get_reward() == 0.0, "b has not been written"
    assert notes.call_tool("write", {"name": "b", "text": "milk"}) == "written"
    assert notes.get_reward() == 1.0


def test_a_model_that_calls_wrongly_is_told_so(notes: McpServer) -> None:
    assert "name" in notes.call_tool("read", {"nome": "a"})
    assert notes.get_reward() == 0.0


@pytest.mark.parametrize("how", ["exit", "hang"])
def test_a_server_that_is_lost_is_no_bad_mark(tasks: str, how: str) -> None:
    notes = McpServer(COMMAND, tasks, HERE)
    notes.reset(json.loads(Path(tasks).read_text().splitlines()[0]))
    notes._timeout_s = 0.5
    try:
        assert notes.call_tool("end", {"how": how}).startswith("Error: ")
        assert notes.get_reward() is None
    finally:
        notes.close()


def test_a_command_may_judge(notes: McpServer) -> None:
    notes.call_tool("read", {"name": "a"})
    for code, reward in ((0, 1.0), (1, 0.0), (2, None)):
        program = (
            "import json, pathlib, sys; given = json.load(sys.stdin);"
            "assert pathlib.Path('a').read_text() == 'milk';"
            "assert given['calls'][0]['result'] == 'milk' and given['task']['messages'];"
            f"sys.exit({code})"
        )
        notes._check = [sys.executable, "-c", program]
        assert notes.get_reward() == reward
    notes._check = ["/nowhere/check"]
    assert notes.get_reward() is None


def test_it_runs_in_a_worker(tasks: str) -> None:
    options = {"command": COMMAND, "tasks": tasks, "environment": HERE, "tools": ["read"]}
    factory = "edge_node.environments.adapters.mcp:McpServer"
    with EnvironmentProcess(EnvironmentSpec(name="n", factory=factory, options=options)) as process:
        environment = process.environment()
        assert isinstance(environment, Episodes)
        (schema,) = environment.schemas
        assert schema["function"]["name"] == "read"
        assert list(schema["function"]["parameters"]["properties"]) == ["name"]
        train = environment.tasks("train", count=30, seed=0)
        held_out = environment.tasks("held_out", count=30, seed=0)
        assert len(train) + len(held_out) == 21
        assert {task.id for task in train}.isdisjoint(task.id for task in held_out)
        episode = environment.start(held_out[0])
        assert episode.call("read", {"name": "a"}) == "milk"
        assert episode.reward() == 1.0
        episode.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no json", "line 1 of .* is no JSON"),
        ('{"messages": 1}', "line 1 of .* has no messages"),
        ('{"messages": []}', "has no expected; expected calls or state, or the option check"),
        ('{"messages": [], "split": "test", "expected": {"calls": []}}', "has split 'test'"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=expected):
        McpServer(COMMAND, str(file))
    with pytest.raises(ValueError, match="cannot be read"):
        McpServer(COMMAND, str(tmp_path / "none"))
