"""Starts the real programs for integration tests: `central serve`, `edge-node serve`, commands.

In: a temporary directory. Out: running processes on free loopback ports, stopped by pid at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def wait_for(
    what: str, seen: Callable[[], T | None], timeout_s: float, logs: Path | None = None
) -> T:
    """The first value of `seen` that is neither None nor False; fails with the end of the logs."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = seen()
        if value is not None and value is not False:
            return value
        time.sleep(0.1)
    ends = "".join(
        f"\n--- {log.name}\n{log.read_text(errors='replace')[-3000:]}"
        for log in sorted(logs.rglob("*.log"))
        if logs
    )
    raise AssertionError(f"{what} did not happen within {timeout_s} s.{ends}")


@dataclass
class Program:
    """A console script of ours with its settings."""

    module: str
    settings: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("EDGE_", "CENTRAL_"))
        }
        return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(self.settings)

    def start(self, *arguments: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, *arguments],
                env=self.environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run one command to its end with the same settings; the text it printed."""
        done = subprocess.run(
            [sys.executable, "-m", self.module, *arguments],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, (
            f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + (done.stderr if code else "")

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))


@contextmanager
def running(program: Program, *arguments: str) -> Iterator[Program]:
    program.start(*arguments)
    try:
        yield program
    finally:
        if program.process is not None and program.process.poll() is None:
            program.stop()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


class Client(threading.Thread):
    """Asks one question on and on; keeps each version's texts, and every failure."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.models: list[str] = []
        self.texts: dict[str, set[str]] = {}
        self.failures: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            try:
                answer = self.client.chat.completions.create(
                    model="lorikeet",
                    messages=[{"role": "user", "content": "w3"}],
                    max_tokens=4,
                    temperature=0,
                )
                self.models.append(answer.model)
                self.texts.setdefault(answer.model, set()).add(
                    answer.choices[0].message.content or ""
                )
            except Exception as error:
                self.failures.append(repr(error))
