"""An environment of Prime Intellect's verifiers (https://github.com/PrimeIntellect-ai/verifiers).

In: a Python that has verifiers and the environment, and the environment's name. Out: its tasks; a
run of its own rollout against the node's endpoint, with its own reward. Guarantees: verifiers runs
in a process of its own, with packages of its own: it takes another `openai` than vLLM does. A text
is never in both splits.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count as numbers
from pathlib import Path
from typing import Any

from edge_node.environments.contract import Split, Task

HOST = Path(__file__).with_name("verifiers_host.py")


class Verifiers:
    """One environment; every node with the same options and packages has the same tasks."""

    def __init__(
        self,
        python: str,
        name: str,
        config: Mapping[str, Any] | None = None,
        lowest: float = 0.0,
        highest: float = 1.0,
    ) -> None:
        """Start the process and load the environment.

        Args:
            python: path of an interpreter in whose environment `verifiers` is installed.
            name: of the environment (before 0.4; `module:Class` too), or of the set of tasks.
            config: arguments of `load_environment` (before 0.4), or the `env` block: `taskset`,
                and what its agents run in.
            lowest: the reward that is worth 0.
            highest: the reward that is worth 1, which passes.

        Raises:
            ValueError: no such interpreter, or verifiers does not load the environment.
        """
        if not lowest < highest:
            raise ValueError(f"lowest is {lowest}; expected less than highest, {highest}")
        self._python, self._name, self._config = python, name, dict(config or {})
        self._lowest, self._highest = lowest, highest
        self._host = self._start()

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        """`count` distinct prompts; a hash decides the split where the environment has but one."""
        found = self._running().ask("tasks", split=split, count=count, seed=seed).result()
        return [
            Task(
                hashlib.sha256(one["text"].encode()).hexdigest()[:16],
                [{"role": "user", "content": one["text"]}],
                {"split": one["split"], "index": one["index"]},
            )
            for one in found
        ]

    async def run(self, task: Task, base_url: str, api_key: str, model: str) -> float | None:
        """The environment's own rollout and reward; raises RuntimeError for one that failed."""
        host, given = self._running(), {"base_url": base_url, "api_key": api_key, "model": model}
        future = host.ask("run", **given, **task.data)
        try:
            reward: float = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            host.cancel(future)
            raise
        if not math.isfinite(reward):
            return None
        return min(1.0, max(0.0, (reward - self._lowest) / (self._highest - self._lowest)))

    def _running(self) -> _Host:
        """The process, or another one when it has ended."""
        if self._host.ended:
            self._host = self._start()
        return self._host

    def _start(self) -> _Host:
        host = _Host(self._python)
        try:
            host.ask("load", name=self._name, config=self._config).result()
        except RuntimeError as error:
            raise ValueError(
                f"verifiers of {self._python} does not load {self._name!r} ({error}); expected an "
                "interpreter with `pip install verifiers` and the environment"
            ) from error
        return host


class _Host:
    """The process; its replies are read by a thread."""

    def __init__(self, python: str) -> None:
        given = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
        try:
            self._process = subprocess.Popen(
                [python, "-I", str(HOST)],
                env=given,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise ValueError(
                f"python is {python!r}, which cannot be started ({error.strerror}); expected the "
                "path of an interpreter"
            ) from error
        self._numbers = numbers()
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._end: RuntimeError | None = None
        threading.Thread(target=self._read, name="verifiers", daemon=True).start()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def ask(self, method: str, **given: Any) -> Future[Any]:
        """What comes of a request; its failure is a RuntimeError."""
        future: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            if self._end is None:
                self._waiting[number] = future
                self._send({"id": number, "method": method, **given})
            else:
                future.set_exception(self._end)
        return future

    def cancel(self, future: Future[Any]) -> None:
        """Ends a run whose result nobody wants."""
        with self._lock:
            for number in [one for one, waiting in self._waiting.items() if waiting is future]:
                del self._waiting[number]
                self._send({"id": number, "method": "cancel"})

    def _send(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended: the thread tells who waits
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            reply = json.loads(line)
            with self._lock:
                future = self._waiting.pop(reply["id"], None)
            if future is None or not future.set_running_or_notify_cancel():
                continue
            if "error" in reply:
                future.set_exception(RuntimeError(reply["error"]))
            else:
                future.set_result(reply["value"])
        code = self._process.wait()
        with self._lock:
            self._end = RuntimeError(f"its process ended with exit code {code}")
            waiting, self._waiting = list(self._waiting.values()), {}
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._end)
