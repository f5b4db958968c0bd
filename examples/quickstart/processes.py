"""Child processes of the quickstart, kept running as a process manager would keep them.

In: command lines with their environment and log file. Out: running children. Guarantees: a child
that ends is started again after a pause and counted; every child has a session of its own, so that
Ctrl-C reaches only us and we stop them in order; only processes that we started are ever signalled
(pid and start time are compared); what runs is written to a file, so that a later command can stop
it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]

RESTART_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0)
POLL_S = 0.2
STOP_TIMEOUT_S = 40.0
EARLY_DEATHS = 4
"""A child that ended this often before it was ever ready will not get better by itself."""


class ChildFailed(RuntimeError):
    """A child keeps ending; the message has the end of its log."""


@dataclass
class Child:
    """One process that is started again whenever it ends, until `stop`."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    directory: Path
    restarts: int = 0
    was_ready: bool = False
    """Set by whoever saw it work; until then a few deaths in a row are final."""
    process: subprocess.Popen[bytes] | None = None
    exit_codes: list[int] = field(default_factory=list)
    _stopping: bool = False

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process and self.process.poll() is None else None

    async def run(self, table: ProcessTable) -> None:
        """Start, watch, start again; raises ChildFailed when it never came up."""
        while not self._stopping:
            started = time.monotonic()
            self.start(table)
            assert self.process is not None
            while (code := self.process.poll()) is None:
                await asyncio.sleep(POLL_S)
            if self._stopping:
                return
            self.exit_codes.append(code)
            self.restarts += 1
            if not self.was_ready and self.restarts >= EARLY_DEATHS:
                raise ChildFailed(
                    f"{self.name} ended {self.restarts} times before it was ready "
                    f"(exit codes {self.exit_codes}). "
                    f"The end of {self.log}:\n{self.log_end()}"
                )
            lived_long = time.monotonic() - started > 60
            await asyncio.sleep(
                RESTART_PAUSES_S[0 if lived_long else min(self.restarts, len(RESTART_PAUSES_S)) - 1]
            )

    def start(self, table: ProcessTable) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(self.command),
                env=dict(self.environment),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        table.record(self.name, self.process.pid)

    async def stop(self) -> None:
        """SIGTERM, wait, then SIGKILL for it and what it started."""
        self._stopping = True
        if self.process is not None and self.process.poll() is None:
            await asyncio.to_thread(stop_tree, self.process.pid, self.process)

    def log_end(self, lines: int = 12) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


class ProcessTable:
    """The file that says what runs: {"name", "pid", "started"} for each child.

    Of each name it has the newest start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict[str, object]] = {}

    def record(self, name: str, pid: int) -> None:
        self._rows[name] = {"name": name, "pid": pid, "started": psutil.Process(pid).create_time()}
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(list(self._rows.values()), indent=1))
        temporary.replace(self.path)


def stop_recorded(path: Path) -> list[str]:
    """Stop what an earlier run left, last started first; returns the names that still ran.

    Removes its table.
    """
    if not path.exists():
        return []
    stopped = []
    for row in reversed(json.loads(path.read_text())):
        try:
            process = psutil.Process(int(row["pid"]))
            ours = abs(process.create_time() - float(row["started"])) < 1
        except psutil.NoSuchProcess:
            continue
        if ours and process.status() != psutil.STATUS_ZOMBIE:
            stop_tree(process.pid)
            stopped.append(str(row["name"]))
    path.unlink()
    return stopped


def stop_tree(pid: int, parent: subprocess.Popen[bytes] | None = None) -> None:
    """SIGTERM to `pid`; what is left of it and its descendants after STOP_TIMEOUT_S is killed."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
    except psutil.NoSuchProcess:
        return
    if parent is not None:
        try:
            parent.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S if parent is None else 5)
    for member in alive:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(alive, timeout=10)


def child_environment(extra: Mapping[str, str], repository: Path) -> dict[str, str]:
    """Our environment without settings of another node or central.

    Each process has one thread and can import `examples`.
    """
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith(("EDGE_", "CENTRAL_"))
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(repository),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **extra,
    }
