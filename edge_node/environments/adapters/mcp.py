"""A server of the Model Context Protocol (https://modelcontextprotocol.io) as tools.

In: a command that starts a server on its standard input and output, and a file of tasks. Out: the
server's tools; a reward for what was done with them. Guarantees: each episode has a server and a
working directory of its own, and both are gone after it. A server that ends, or does not answer in
time, is never a bad mark. Needs the package mcp.

The file has one task a line, a JSON object:

    {"id": "tokyo", "split": "train", "messages": [{"role": "user", "content": "..."}],
     "files": {"notes.txt": "..."},
     "expected": {"calls": [{"tool": "convert_time", "arguments": {"time": "16:30"}}],
                  "state": [{"tool": "read", "arguments": {"path": "b.txt"}, "contains": "yes"}]}}

`files` are written before the server starts. Of `expected`, `calls` are those that the model must
have made without an error, with these arguments among them; `state` are calls that the adapter
makes at the end, and whose text must contain `contains`. Without `split` a hash of the messages
decides.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edge_node.environments.contract import Split, Task

LOST = (-32000, -32001)
"""Codes of an MCPError when the connection is closed, or the time is over."""


class McpServer:
    """One server; an instance is one episode."""

    def __init__(
        self,
        command: Sequence[str],
        tasks: str,
        environment: Mapping[str, str] | None = None,
        tools: Sequence[str] = (),
        check: Sequence[str] = (),
        timeout_s: float = 30.0,
    ) -> None:
        """Read the tasks.

        Args:
            command: program and arguments of the server.
            tasks: path of the file of tasks.
            environment: variables of the server, beside PATH and HOME.
            tools: names of the tools that the model gets; all of them without.
            check: a command that judges an episode in its working directory. It reads
                `{"task": ..., "calls": [...]}` from its standard input. Exit code 0 is a reward of
                1 and 1 is one of 0; any other says that nobody knows. It replaces `expected`.
            timeout_s: longest time of one answer of the server, and of the check.

        Raises:
            ModuleNotFoundError: mcp is not installed.
            ValueError: a file of tasks that cannot be used.
        """
        try:
            self._mcp = importlib.import_module("mcp")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the package {error.name} is not installed; expected what `pip install mcp` "
                "installs"
            ) from error
        if not command:
            raise ValueError("command is empty; expected a program and its arguments")
        self._command, self._environment = list(command), dict(environment or {})
        self._chosen, self._check, self._timeout_s = list(tools), list(check), timeout_s
        self._lines = _read(Path(tasks), needs_expected=not check)
        self._held = ExitStack()
        self._calls: list[dict[str, Any]] = []
        self._lost = False

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` lines of the file, in an order that the seed chooses."""
        lines = [line for line in self._lines if line["split"] == split]
        random.Random(f"{split}/{seed}").shuffle(lines)
        return [Task(line["id"], line["messages"], {"line": line}) for line in lines[:count]]

    def tools(self) -> list[dict[str, Any]]:
        """The server's tools, with their own schemas."""
        with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
            portal, client = self._start(folder, held)
            listed = portal.call(client.list_tools).tools
        found = {tool.name: tool for tool in listed}
        if missing := sorted(set(self._chosen) - set(found)):
            raise ValueError(
                f"tools names {', '.join(missing)}; the server has {', '.join(sorted(found))}"
            )
        return [_schema(found[name]) for name in self._chosen or found]

    def reset(self, line: Mapping[str, Any]) -> str | None:
        """Start a server in a new directory, with the task's files."""
        self._line = line
        self._folder = Path(self._held.enter_context(tempfile.TemporaryDirectory()))
        for name, text in line.get("files", {}).items():
            file = self._folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        self._portal, self._client = self._start(str(self._folder), self._held)
        return None

    def call_tool(self, name: str, arguments: Mapping[str, Any]) -> str:
        """The text of the server's answer, also of an error of its."""
        text, failed = self._ask(name, arguments)
        self._calls.append(
            {"tool": name, "arguments": dict(arguments), "result": text, "error": failed}
        )
        return text

    def get_reward(self) -> float | None:
        """1 or 0, by `check` or by `expected`; None when the server or the check is lost."""
        if self._lost:
            return None
        if self._check:
            return self._judged()
        expected = self._line["expected"]
        made = all(self._was_made(call) for call in expected.get("calls", ()))
        holds = made and all(self._holds(state) for state in expected.get("state", ()))
        return None if self._lost else float(holds)

    def close(self) -> None:
        """End the server."""
        self._held.close()

    def _start(self, folder: str, held: ExitStack) -> tuple[Any, Any]:
        """A portal into the client's event loop, and the client; both end with `held`."""
        anyio = importlib.import_module("anyio.from_thread")
        parameters = self._mcp.StdioServerParameters(
            command=self._command[0],
            args=self._command[1:],
            env=self._environment,
            cwd=folder,
        )
        client = self._mcp.Client(parameters, read_timeout_seconds=self._timeout_s)
        portal = held.enter_context(anyio.start_blocking_portal())
        return portal, held.enter_context(portal.wrap_async_context_manager(client))

    def _ask(self, name: str, arguments: Mapping[str, Any]) -> tuple[str, bool]:
        """The text of the answer, and whether it is an error."""
        try:
            call = self._client.call_tool
            result = self._portal.call(call, name, dict(arguments), self._timeout_s)
        except self._mcp.MCPError as error:
            self._lost = self._lost or error.code in LOST
            return f"Error: {error.message}", True
        texts = [part.text for part in result.content if part.type == "text"]
        return "\n".join(texts), bool(result.is_error)

    def _was_made(self, expected: Mapping[str, Any]) -> bool:
        wanted = expected.get("arguments", {})
        return any(
            call["tool"] == expected["tool"]
            and not call["error"]
            and call["arguments"] | wanted == call["arguments"]
            for call in self._calls
        )

    def _holds(self, expected: Mapping[str, Any]) -> bool:
        text, failed = self._ask(expected["tool"], expected.get("arguments", {}))
        return not failed and expected["contains"] in text

    def _judged(self) -> float | None:
        given = json.dumps({"task": self._line, "calls": self._calls})
        try:
            done = subprocess.run(
                self._check,
                input=given,
                text=True,
                cwd=self._folder,
                timeout=self._timeout_s,
                stdout=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return {0: 1.0, 1: 0.0}.get(done.returncode)


def _schema(tool: Any) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description or tool.name,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


def _read(path: Path, *, needs_expected: bool) -> list[dict[str, Any]]:
    """The lines of a file of tasks, each with an id and a split; raises ValueError."""
    found: dict[str, dict[str, Any]] = {}
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"tasks is {str(path)!r}, which cannot be read ({error})") from error
    for number, written in enumerate(text.splitlines(), 1):
        if not written.strip():
            continue
        line = _line(written, f"line {number} of {path}", needs_expected)
        if line["id"] in found:
            raise ValueError(f"line {number} of {path} repeats another; expected distinct tasks")
        found[line["id"]] = line
    return list(found.values())


def _line(written: str, where: str, needs_expected: bool) -> dict[str, Any]:
    try:
        line = json.loads(written)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error})") from error
    if not isinstance(line, dict) or not isinstance(line.get("messages"), list):
        raise ValueError(f"{where} has no messages; expected an object with a list of them")
    if needs_expected and not line.get("expected"):
        raise ValueError(f"{where} has no expected; expected calls or state, or the option check")
    digest = hashlib.sha256(json.dumps(line["messages"]).encode()).hexdigest()
    line.setdefault("id", digest[:16])
    line.setdefault("split", "train" if int(digest[-1], 16) % 2 == 0 else "held_out")
    if line["split"] not in ("train", "held_out"):
        raise ValueError(f"{where} has split {line['split']!r}; expected train or held_out")
    return line
