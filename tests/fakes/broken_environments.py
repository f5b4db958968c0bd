"""Environments that do not keep the contract, each in one way. Ordinary plug-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from stat import S_ISSOCK
from types import SimpleNamespace
from typing import Any

from edge_node.environments import Document, EnvironmentProcess, Outcome, Task
from edge_node.settings import EnvironmentSpec
from tests.fakes.text_environment import Texts
from tests.fakes.word_environment import NextWord

SECRET = "the secret recipe of a customer"


def _hang() -> None:
    while True:
        time.sleep(3600)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)
    _hang()


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit() -> None:
    sys.exit(3)


def _memory() -> None:
    kept = []
    while True:
        kept.append(bytearray(64 << 20))


def _raise() -> None:
    raise KeyError(SECRET)


def _shout() -> None:
    print(SECRET, flush=True)
    print(SECRET, file=sys.stderr, flush=True)
    os.write(1, SECRET.encode())


def _nameless_signal() -> None:
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
    _hang()


def _link() -> int:
    """The socket that the worker answers on."""
    found = (path for path in Path("/proc/self/fd").iterdir() if path.exists())
    return next(int(path.name) for path in found if S_ISSOCK(path.stat().st_mode))


def _write(line: bytes) -> None:
    os.write(_link(), line)


def _fork() -> None:
    """The fork raises, out of the plug-in."""
    pid = os.fork()
    if pid == 0:
        raise KeyError(SECRET)
    os.waitpid(pid, 0)


def _leave() -> None:
    """A process outside the worker's group keeps the worker's link open."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(30)
        os._exit(0)
    _hang()


WAYS: dict[str, Callable[[], None]] = {
    "hang": _hang,
    "crash": _crash,
    "exit": _exit,
    "killed": _killed,
    "memory": _memory,
    "raise": _raise,
    "shout": _shout,
    "nameless signal": _nameless_signal,
    "text on the link": lambda: _write(b'"ends"\n'),
    "list on the link": lambda: _write(b'["ends"]\n'),
    "no value on the link": lambda: _write(b"{}\n"),
    "leave": _leave,
    "fork": _fork,
}
OUTCOMES: dict[str, Any] = {
    "no outcome": None,
    "passed": SimpleNamespace(passed="yes", score=1.0, reason="", correction=None),
    "score": SimpleNamespace(passed=True, score="1", reason="", correction=None),
    "nan": Outcome(True, float("nan"), "", None),
    "high": Outcome(True, 1.5, "", None),
    "low": Outcome(False, -0.1, "", None),
    "reason": SimpleNamespace(passed=True, score=1.0, reason=None, correction=None),
    "half": Outcome(False, 0.0, "", "\ud83d"),
    "correction": SimpleNamespace(passed=True, score=1.0, reason="", correction=7),
}


class Verifying(NextWord):
    """Fails in `verify`, in the way `how`, until the file `mended` exists."""

    def __init__(self, how: str, mended: str = "/nowhere") -> None:
        super().__init__()
        self._how = how
        self._mended = Path(mended)

    def verify(self, task: Task, answer: str) -> Outcome:
        if self._mended.exists():
            return super().verify(task, answer)
        if self._how in OUTCOMES:
            made: Outcome = OUTCOMES[self._how]
            return made
        WAYS[self._how]()
        return super().verify(task, answer)


class Loading(NextWord):
    def __init__(self, how: str) -> None:
        super().__init__()
        WAYS[how]()


class Starting(NextWord):
    """Starts a process of its own, which outlives a verifier that hangs unless it is ended."""

    def __init__(self, pid_file: str) -> None:
        super().__init__()
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        Path(pid_file).write_text(str(child.pid))


class Tasks(NextWord):
    """Gives tasks that break the contract in the way `how`."""

    def __init__(self, how: str, mended: str = "/nowhere") -> None:
        super().__init__()
        self._how = how
        self._mended = Path(mended)

    def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
        good = list(super().tasks(split, count=count, seed=seed))
        if self._mended.exists():
            return good
        if self._how == "bounded" and count <= 20:
            return good
        if self._how == "bounded":
            raise ValueError(SECRET)
        if self._how in WAYS:
            WAYS[self._how]()
        messages = good[0].messages
        bad: dict[str, Any] = {
            "none": None,
            "twice": [good[0], good[0]],
            "many": [*good, *super().tasks("train", count=1, seed=seed)],
            "id": [Task(7, messages)],  # type: ignore[arg-type]
            "empty id": [Task("", messages)],
            "no messages": [Task("t", [])],
            "a text": [Task("t", SECRET)],  # type: ignore[arg-type]
            "no role": [Task("t", [{"content": SECRET}])],
            "parts": [Task("t", [{"role": "user", "content": [SECRET]}])],  # type: ignore[dict-item]
            "data": [Task("t", messages, {"judge": lambda: SECRET})],
            "half id": [Task("t\ud83d", messages)],
            "half content": [Task("t", [{"role": "user", "content": "\udcff"}])],
            "weight 0": [Task("t", messages, weight=0)],
            "weight nan": [Task("t", messages, weight=float("nan"))],
            "weight text": [Task("t", messages, weight="2")],  # type: ignore[arg-type]
            "weight high": [Task("t", messages, weight=1e9)],
            "difficulty text": [Task("t", messages, difficulty="easy")],  # type: ignore[arg-type]
            "difficulty low": [Task("t", messages, difficulty=-1)],
            "difficulty half": [Task("t", messages, difficulty=0.5)],  # type: ignore[arg-type]
            "unordered": super().tasks(split, count=count, seed=seed + count),
        }
        made: Sequence[Task] = bad[self._how]
        return made

    def reference_answer(self, task: Task) -> Any:
        return 8 if self._how == "answer" else super().reference_answer(task)


def made(kind: str, *options: str, name: str = "acme", **limits: Any) -> EnvironmentProcess:
    """As a node runs one of these; options are `how`, and the file that mends it."""
    spec = EnvironmentSpec(
        name=name,
        factory=f"{__name__}:{kind}",
        options=dict(zip(("how", "mended"), options, strict=False)),
        **limits,
    )
    return EnvironmentProcess(spec)


class Reading(Texts):
    """Documents that break the contract in the way `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    def documents(self, split: Any, *, count: int, seed: int) -> Any:
        if self._how in WAYS:
            WAYS[self._how]()
        good = super().documents(split, count=count, seed=seed)
        bad: dict[str, Any] = {
            "twice": [good[0], good[0]],
            "half": [Document("d", "w1\ud83d")],
            "number": [Document("d", 7)],  # type: ignore[arg-type]
        }
        return bad[self._how]


class OwnKind(NextWord):
    """Its tasks are of a class of its own, with data that JSON does not know."""

    def tasks(self, split: Any, *, count: int, seed: int) -> Any:
        return (
            Kept(task.id, task.messages, {"pair": (1, 2), 7: {3}}, task.data["number"])
            for task in super().tasks(split, count=count, seed=seed)
        )

    def verify(self, task: Any, answer: str) -> Outcome:
        kept = isinstance(task, Kept) and task.data == {"pair": (1, 2), 7: {3}}
        return Outcome(kept and answer == f"w{task.number + 1}", 1.0, "", None)


class Kept:
    def __init__(self, id: str, messages: Any, data: Any, number: int) -> None:
        self.id, self.messages, self.data, self.number = id, messages, data, number


class Checked(NextWord):
    """Keeps the contract, but for what `how` says; only `environments check` finds it."""

    def __init__(self, how: str) -> None:
        super().__init__(0, 400)
        self._how = how

    def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
        if self._how == "no tasks":
            return []
        if self._how == "count":
            seed += count
        if self._how == "process":
            seed += os.getpid()
        if self._how == "time":
            seed = time.perf_counter_ns()
        drawn = list(
            super().tasks("train" if self._how == "shared" else split, count=count, seed=seed)
        )
        if self._how == "repeats" and len(drawn) > 1:
            drawn[1] = Task("other", drawn[0].messages, drawn[0].data)
        if self._how == "levels":
            drawn = [
                replace(task, weight=1.0 + number % 3, difficulty=number % 2 or None)
                for number, task in enumerate(drawn)
            ]
        return drawn

    def verify(self, task: Task, answer: str) -> Outcome:
        if self._how == "empty" and not answer:
            return Outcome(True, 1.0, "", None)
        if self._how == "reference":
            return Outcome(False, 0.0, "", None)
        return super().verify(task, answer)

    def reference_answer(self, task: Task) -> Any:
        return None if self._how == "unknown" else super().reference_answer(task)
