"""An environment's worker process: starts it, asks it, ends it, and starts it anew.

In: an EnvironmentSpec. Out: an Environment, Episodes, Agents or a TextEnvironment; the worker
(worker.py) answers its calls. Guarantees: a worker that hangs, crashes, needs too much memory or
breaks the contract costs an EnvironmentFault that says so, and nothing else. The next call starts
another worker, after a pause that doubles while workers keep ending soon. What an environment
prints goes nowhere, because it may be a prompt or an answer, unless a person asked to see it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import count
from typing import Any, TypeVar

from edge_node.environments.child import Child, Ended
from edge_node.environments.contract import (
    AgentRun,
    AnyEnvironment,
    Document,
    Episode,
    Outcome,
    Split,
    Task,
)
from edge_node.environments.wire import (
    SEALED,
    read_answer,
    read_documents,
    read_outcome,
    read_reward,
    read_tasks,
)
from edge_node.errors import EnvironmentFault, SettingsError
from edge_node.settings import EnvironmentSpec
from lorikeet.pauses import doubling

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STEADY_S = 60.0
"""After a worker that ran this long the next pause is short again."""
_WAITING = ThreadPoolExecutor(32, "environment call")


class EnvironmentProcess:
    """Thread-safe. Starts its worker at the first use, and runs at most one at a time."""

    def __init__(
        self,
        spec: EnvironmentSpec,
        *,
        shows_output: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """shows_output: what the environment prints goes to stderr, for its author."""
        self.spec = spec
        self._shows_output = shows_output
        self._clock = clock
        self._lock = threading.Lock()
        self._worker: Child | None = None
        self._closed = False
        self._pauses = doubling(FIRST_PAUSE_S, MAX_PAUSE_S)
        self._not_before, self._last_end = clock(), ""

    def __enter__(self) -> EnvironmentProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The worker's, while it runs."""
        worker = self._worker
        return None if worker is None else worker.pid

    def start(self) -> str:
        """Load the environment now; returns its kind: `tasks`, `tools`, `agents` or `texts`.

        Raises:
            SettingsError: EDGE_ENVIRONMENTS names what cannot be loaded.
            EnvironmentFault: its code hung, crashed or needed too much memory.
        """
        try:
            loaded = self._running().loaded
            loaded.result()
        except Ended as end:
            if end.mistake:
                raise SettingsError(str(end)) from None
            raise EnvironmentFault(self.spec.name, str(end)) from None
        return Reply(self.spec.name, loaded).value(str)

    def environment(self) -> AnyEnvironment:
        """The environment, loaded; its calls raise EnvironmentFault, and so does this."""
        try:
            kind = self.start()
        except SettingsError:
            # Central may get a fault's words, and the mistake's quote options and the plug-in.
            name = self.spec.name
            raise EnvironmentFault(
                name,
                f"Environment {name!r} cannot be loaded; `edge-node environments check {name}` "
                "says why.",
            ) from None
        if kind == "tools":
            return _Episodes(self)
        if kind == "agents":
            return _Agents(self)
        return _Texts(self) if kind == "texts" else _Tasks(self)

    def ask(self, method: str, **given: Any) -> Reply:
        """Sends a call; `Reply.value` waits for what comes of it. Raises EnvironmentFault."""
        try:
            return Reply(self.spec.name, self._running().ask(method, given))
        except Ended as end:
            raise EnvironmentFault(self.spec.name, str(end)) from None

    def close(self) -> None:
        """End the worker; idempotent. A later call raises EnvironmentFault."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()

    def _running(self) -> Child:
        """The worker, or a new one; raises Ended in the pause before that."""
        with self._lock:
            if self._closed:
                raise Ended(f"Environment {self.spec.name!r} is not asked any more.")
            if self._worker is not None and self._worker.can_answer():
                return self._worker
            left_s = self._not_before - self._clock()
            if left_s > 0:
                raise Ended(f"{self._last_end} It is started again in {left_s:.1f} s.")
            self._worker = Child(self.spec, self._shows_output, self._ended)
            return self._worker

    def _ended(self, ran_s: float, text: str) -> None:
        """A worker ended that should not have."""
        with self._lock:
            if ran_s > STEADY_S:
                self._pauses = doubling(FIRST_PAUSE_S, MAX_PAUSE_S)
            self._not_before, self._last_end = self._clock() + next(self._pauses), text
        log.warning("environment ended", extra={"environment": self.spec.name, "why": text})


class Reply:
    """What comes of a call that was sent."""

    def __init__(self, environment: str, future: Future[dict[str, Any]]) -> None:
        self._environment = environment
        self._future = future

    def value(self, read: Callable[[Any], T]) -> T:
        """Waits for the worker's value; raises EnvironmentFault."""
        name = self._environment
        try:
            reply = self._future.result()
            if "raised" in reply:
                raise EnvironmentFault(
                    name,
                    f"Environment {name!r} raised {reply['raised']}; expected it to raise nothing.",
                    raised=True,
                )
            if "lost" in reply:
                raise EnvironmentFault(
                    name, f"Environment {name!r} lost this episode: its worker was started anew."
                )
            return read(reply["value"])
        except Ended as end:
            raise EnvironmentFault(name, str(end)) from None
        except (KeyError, TypeError, ValueError):
            raise EnvironmentFault(
                name, f"Environment {name!r} wrote into its worker's link; expected it not to."
            ) from None


class _Tasks:
    """The contract's Environment; a task's `data` is sealed (wire.py)."""

    def __init__(self, process: EnvironmentProcess) -> None:
        self._ask = process.ask

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return self._ask("tasks", split=split, count=count, seed=seed).value(read_tasks)

    def verify(self, task: Task, answer: str) -> Outcome:
        return self._ask("verify", task=task.data[SEALED], answer=answer).value(read_outcome)

    def reference_answer(self, task: Task) -> str | None:
        return self._ask("reference_answer", task=task.data[SEALED]).value(read_answer)


class _Episodes:
    """The contract's Episodes; numbers episodes for the worker."""

    def __init__(self, process: EnvironmentProcess) -> None:
        self._ask = process.ask
        self._numbers = count()
        self.schemas: list[dict[str, Any]] = process.ask("tools").value(list)

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return self._ask("tasks", split=split, count=count, seed=seed).value(read_tasks)

    def start(self, task: Task) -> Episode:
        return _Episode(self._ask, next(self._numbers), task)


class _Episode:
    def __init__(self, ask: Callable[..., Reply], number: int, task: Task) -> None:
        self._ask = partial(ask, episode=number)
        self._open = True
        self.opening = self._ask("reset", task=task.data[SEALED]).value(read_answer)

    def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        return self._ask("call", tool=tool, arguments=dict(arguments)).value(str)

    def reward(self) -> float | None:
        return self._ask("get_reward").value(read_reward)

    def feedback(self) -> str | None:
        return self._ask("feedback").value(read_answer)

    def close(self) -> None:
        if self._open:
            self._open = False
            with suppress(EnvironmentFault):  # what it did is known already
                self._ask("close").value(read_answer)


class _Agents:
    """The contract's Agents."""

    def __init__(self, process: EnvironmentProcess) -> None:
        self._name = process.spec.name
        self._ask = process.ask

    def tasks(self, split: Split, *, count: int, seed: int) -> Sequence[Task]:
        return self._ask("tasks", split=split, count=count, seed=seed).value(read_tasks)

    def run_all(self, runs: Sequence[AgentRun]) -> list[float | EnvironmentFault | None]:
        given = [asdict(run) | {"task": run.task.data[SEALED]} for run in runs]
        return [self._result(one) for one in self._ask("run_all", runs=given).value(list)]

    def _result(self, one: Mapping[str, Any]) -> float | EnvironmentFault | None:
        if "raised" in one:
            text = f"Environment {self._name!r} {one['raised']}."
            return EnvironmentFault(self._name, text, raised=True)
        return read_reward(one["reward"])


class _Texts:
    """The contract's TextEnvironment."""

    def __init__(self, process: EnvironmentProcess) -> None:
        self._ask = process.ask

    def documents(self, split: Split, *, count: int, seed: int) -> Sequence[Document]:
        return self._ask("documents", split=split, count=count, seed=seed).value(read_documents)


async def in_own_thread(call: Callable[..., T], *given: Any, **named: Any) -> T:
    """`call` of an environment, for an event loop.

    It may take as long as call_timeout_s, so it takes no thread of `asyncio.to_thread`: there are
    few, and the rest of the node stops without them.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_WAITING, partial(call, *given, **named))


def verify_all(process: EnvironmentProcess, answers: Sequence[tuple[Task, str]]) -> list[Outcome]:
    """Verdicts on many answers, in their order; the worker never waits for the node in between.

    Raises EnvironmentFault.
    """
    replies = [
        process.ask("verify", task=task.data[SEALED], answer=answer) for task, answer in answers
    ]
    return [reply.value(read_outcome) for reply in replies]
