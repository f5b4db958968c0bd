"""Bad input as a new user would meet it: each mistake gets one clear message and an exit code.

In: nothing; starts a central and one node of its own in a temporary directory. Out: a table of what
was tried, the message and the code; exit code 0 only when every mistake was met as expected.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from examples.ports import free_ports
from examples.quickstart.demo import build_base_model
from examples.quickstart.system import ALIAS, BIN, REPOSITORY, System
from examples.quickstart.tiny import NODES, QUICKSTART, SIZES

LIMIT_S = 60.0
CODES = {"settings": 2, "enrolment": 3, "central": 4, "storage": 5, "serving": 6}
"""Exit codes of edge_node.errors and central.errors."""
WAITS = "waits"
"""The program goes on trying, and its log says what it waits for."""
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d")


@dataclass(frozen=True)
class Tried:
    """One mistake and how it was met."""

    mistake: str
    expected: str
    got: str
    message: str
    holds: bool


class Trial:
    """A running central, the base model, and a node's settings to spoil."""

    def __init__(self, system: System, base: Path, folder: Path, token: str) -> None:
        self._system = system
        self._folder = folder
        self._token = token
        self._base = base
        self._count = 0
        self.tried: list[Tried] = []

    async def run(self) -> None:
        await asyncio.to_thread(self._settings)
        await asyncio.to_thread(self._storage)
        await self._enrolment()
        await asyncio.to_thread(self._central)

    def _settings(self) -> None:
        node = self._node_settings()
        self._edge("unknown setting", "enroll", node | {"EDGE_SERVNG__PORT": "1"}, "settings")
        self._edge(
            "unknown setting in a group", "enroll", node | {"EDGE_SERVING__PROT": "1"}, "settings"
        )
        self._edge(
            "setting with a bad value", "enroll", node | {"EDGE_SERVING__PORT": "many"}, "settings"
        )
        self._edge(
            "environments that are not JSON",
            "enroll",
            node | {"EDGE_ENVIRONMENTS": "acme"},
            "settings",
        )
        self._edge("no model directory", "enroll", without(node, "EDGE_BASE__PATH"), "settings")
        empty = self._folder / "not-a-model"
        empty.mkdir()
        self._edge(
            "model directory that is not one",
            "enroll",
            node | {"EDGE_BASE__PATH": str(empty)},
            "settings",
        )
        missing = str(self._folder / "nowhere")
        self._edge(
            "model directory that does not exist",
            "enroll",
            node | {"EDGE_BASE__PATH": missing},
            "settings",
        )
        wrong = [{"name": "x", "factory": "no.such.module:Thing"}]
        self._edge(
            "environment that cannot be loaded",
            "doctor",
            node | {"EDGE_ENVIRONMENTS": json.dumps(wrong)},
            1,
        )

    def _storage(self) -> None:
        node = self._node_settings()
        file = self._folder / "a-file"
        file.touch()
        self._edge(
            "data directory below a file",
            "enroll",
            node | {"EDGE_DATA_DIR": str(file / "data")},
            "storage",
        )
        self._edge(
            "data directory that is not writable",
            "enroll",
            node | {"EDGE_DATA_DIR": "/proc/lorikeet"},
            "storage",
        )

    async def _enrolment(self) -> None:
        node = self._node_settings()
        token = "EDGE_CENTRAL__JOIN_TOKEN"

        async def enroll(mistake: str, settings: Mapping[str, str], code: str) -> None:
            await asyncio.to_thread(self._edge, mistake, "enroll", settings, code)

        await enroll("no token", without(node, token), "enrolment")
        await enroll("token that is not one", node | {token: "let me in"}, "enrolment")
        await enroll("token cut short", node | {token: self._token[:-40]}, "enrolment")
        other = await self._system.central_cli(
            "tokens", "create", "--cohort", "shared", "--uses", "1", "--json"
        )
        await enroll(
            "token with a wrong secret", node | {token: forged(other["token"])}, "enrolment"
        )
        changed = self._folder / "other-base"
        shutil.copytree(self._base, changed)
        config = json.loads((changed / "config.json").read_text())
        (changed / "config.json").write_text(json.dumps(config | {"vocab_note": "another model"}))
        await enroll(
            "another base than central's", node | {"EDGE_BASE__PATH": str(changed)}, "enrolment"
        )
        [free] = free_ports(1)
        address = {
            "EDGE_CENTRAL__ENROLLMENT_ADDRESS": f"localhost:{free}",
            "EDGE_CENTRAL__CALL_TIMEOUT_S": "3",
        }
        await asyncio.to_thread(self._edge, "central down at start", "serve", node | address, WAITS)
        await enroll("central down at enrolment", node | address, "central")
        enrolled = self._node_settings()
        done = await asyncio.to_thread(call, [str(BIN / "edge-node"), "enroll"], enrolled)
        if done.returncode != 0:
            raise RuntimeError(f"A correct enrolment failed: {done.stderr}")
        await enroll(
            "name that another node has",
            self._node_settings() | {"EDGE_NODE_NAME": enrolled["EDGE_NODE_NAME"]},
            "enrolment",
        )
        with taken_port() as port:
            settings = enrolled | {"EDGE_SERVING__PORT": str(port)}
            await asyncio.to_thread(
                self._edge, "port of the endpoint taken", "serve", settings, "serving"
            )
        await asyncio.to_thread(
            self._edge,
            "status of a node that is not enrolled",
            "status",
            self._node_settings(),
            "enrolment",
        )
        await asyncio.to_thread(
            self._edge, "approval of an unknown update", "outbox approve 123456", enrolled, 1
        )

    def _central(self) -> None:
        running = self._system.central.environment
        fresh = {**running, "CENTRAL_DATA_DIR": str(self._folder / "central-2")}
        ports = dict(
            zip(
                ("CENTRAL_LISTEN__PORT", "CENTRAL_LISTEN__ENROLLMENT_PORT"),
                map(str, free_ports(2)),
                strict=True,
            )
        )
        self._operator(
            "unknown setting at central",
            "serve",
            fresh | ports | {"CENTRAL_GATE__TASK": "5"},
            "settings",
        )
        self._operator(
            "no model directory at central",
            "serve",
            without(fresh | ports, "CENTRAL_BASE__PATH"),
            "settings",
        )
        file = self._folder / "b-file"
        file.touch()
        self._operator(
            "central's data directory below a file",
            "serve",
            fresh | ports | {"CENTRAL_DATA_DIR": str(file / "x")},
            "storage",
        )
        self._operator("central's port taken", "serve", fresh, "serving")
        self._operator("listing while central is down", "nodes", dict(running) | ports, None)
        self._operator(
            "promotion of an unknown release",
            "releases promote 123456 --channel stable",
            running,
            None,
        )
        self._operator("token for a bad cohort name", "tokens create --cohort ../x", running, None)

    async def endpoint(self, url: str) -> None:
        """Mistakes of a client of a serving node."""
        chat = {"model": ALIAS, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        nobody = {"id": "chatcmpl-nobody"}
        requests: list[tuple[str, str, Any, int]] = [
            ("feedback for an unknown id", "/v1/feedback", nobody | {"score": 1}, 404),
            ("feedback that says nothing", "/v1/feedback", nobody, 400),
            ("feedback with a score of 7", "/v1/feedback", nobody | {"score": 7}, 400),
            ("feedback with an unknown field", "/v1/feedback", nobody | {"stars": 5}, 400),
            ("feedback that is no object", "/v1/feedback", [1, 2], 400),
            ("unknown model", "/v1/chat/completions", chat | {"model": "gpt-x"}, 404),
            (
                "version that is not loaded",
                "/v1/chat/completions",
                chat | {"model": f"{ALIAS}@v9-00000000"},
                404,
            ),
            ("no messages", "/v1/chat/completions", {"model": ALIAS}, 400),
        ]
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            for mistake, path, body, status in requests:
                response = await client.post(path, json=body)
                message = " ".join(response.text.split())
                ok = response.status_code == status and "Traceback" not in message
                self.tried.append(
                    Tried(
                        mistake, f"HTTP {status}", f"HTTP {response.status_code}", message[:300], ok
                    )
                )
            alive = await client.post("/v1/chat/completions", json=chat)
            self.tried.append(
                Tried(
                    "a good request after all of them",
                    "HTTP 200",
                    f"HTTP {alive.status_code}",
                    "",
                    alive.status_code == 200,
                )
            )

    def _edge(
        self, mistake: str, command: str, settings: Mapping[str, str], code: str | int | None
    ) -> None:
        self._try(mistake, "edge-node", command, settings, code)

    def _operator(
        self, mistake: str, command: str, settings: Mapping[str, str], code: str | int | None
    ) -> None:
        self._try(mistake, "central", command, settings, code)

    def _try(
        self,
        mistake: str,
        program: str,
        command: str,
        settings: Mapping[str, str],
        code: str | int | None,
    ) -> None:
        """`code`: an exit code, its name, WAITS, or None for any but 0."""
        expected = CODES[code] if isinstance(code, str) and code != WAITS else code
        began = time.monotonic()
        try:
            done = call([str(BIN / program), *command.split()], settings)
            got: str | int = done.returncode
            text = done.stdout + done.stderr if command == "doctor" else done.stderr or done.stdout
        except subprocess.TimeoutExpired as stopped:
            got, text = WAITS, (stopped.stderr or b"").decode()
        log = [line for line in text.splitlines() if LOG_LINE.match(line)]
        lines = [line for line in text.strip().splitlines() if line not in log]
        if command == "doctor":
            told, one_message = [line for line in lines if "FAIL" in line], True
        elif got == WAITS:
            told, one_message = [line for line in log if " WARNING " in line][-1:], not lines
        else:
            told, one_message = lines, len(lines) == 1 and lines[0].startswith(f"{program}: ")
        right_code = got == expected if expected is not None else got not in (0, WAITS)
        holds = right_code and one_message and bool(told) and "Traceback" not in text
        message = "\n".join(told if one_message else lines[-4:])
        self.tried.append(
            Tried(
                f"{mistake}\n[dim]{program} {command}, {time.monotonic() - began:.0f} s[/]",
                "not 0" if expected is None else str(expected),
                str(got),
                message[:600],
                holds,
            )
        )

    def _node_settings(self) -> dict[str, str]:
        """Good settings of a node that is not enrolled yet."""
        self._count += 1
        plan = NODES["A"]
        name = f"new-{self._count}"
        settings = self._system.node_environment(plan, self._token)
        own = {"EDGE_NODE_NAME": name, "EDGE_DATA_DIR": str(self._folder / name)}
        return settings | own | {"EDGE_SERVING__PORT": str(free_ports(1)[0])}


def call(command: list[str], settings: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=dict(settings),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def without(settings: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in settings.items() if key != name}


def forged(token: str) -> str:
    """The same token with another secret."""
    prefix, _, body = token.partition(".")
    document = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    document["secret"] = document["secret"][::-1]
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    return f"{prefix}.{base64.urlsafe_b64encode(text).decode().rstrip('=')}"


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


async def _run(console: Console) -> int:
    base, _, _ = await asyncio.to_thread(build_base_model, QUICKSTART, console)
    with tempfile.TemporaryDirectory(prefix="lorikeet-bad-input-") as name:
        folder = Path(name)
        system = System(
            QUICKSTART, folder / "run", base, replace(SIZES["small"], nodes=("A",)), seed=0
        )
        try:
            await system.start()
            answer = await system.central_cli(
                "tokens", "create", "--cohort", "shared", "--uses", "50", "--json"
            )
            trial = Trial(system, base, folder, answer["token"])
            await trial.run()
            await system.wait_ready("A")
            await trial.endpoint(system.url("A"))
        finally:
            await asyncio.shield(system.stop())
    table = Table(
        title="Bad input, as a new user would meet it", title_justify="left", show_lines=True
    )
    for column in ("", "mistake", "expected", "got", "message"):
        table.add_column(column, overflow="fold")
    for tried in trial.tried:
        row = (tried.mistake, tried.expected, tried.got)
        table.add_row(
            "[green]PASS[/]" if tried.holds else "[red]FAIL[/]",
            *row,
            tried.message.replace("[", "\\["),
        )
    console.print(table)
    bad = sum(not tried.holds for tried in trial.tried)
    console.print(f"{len(trial.tried)} tried, {bad} not met as expected")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_run(Console())))
