"""The supervised vLLM child.

In: settings, the base model, a path for the control socket. Out: a serving process, started again
when it exits or hangs. That is the problem of room `serving` until another one has run for a while
(problems.calm_s). Guarantees: at most one vLLM at a time; it dies with this process, also of
`kill -9`; while none serves, the port answers 503 (doorway.py); its log is in
data_dir/logs/vllm.log. Create it in the event loop of the main thread: Linux ties a child's life to
that thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Protocol

import httpx

from edge_node.errors import ServingError, StorageError
from edge_node.problems import Problems, calm_s
from edge_node.serving.client import ControlClient, socket_problem
from edge_node.serving.command import (
    LISTEN_VARIABLE,
    SHUTDOWN_TIMEOUT_S,
    runs_on_cpu,
    serving_command,
    serving_environment,
)
from edge_node.serving.doorway import Doorway
from edge_node.serving.endpoint import start_problem
from edge_node.serving.failure import raised_at, startup_reason
from edge_node.serving.loading import forget_loading
from edge_node.settings import EdgeSettings
from edge_node.surroundings import give_room
from lorikeet import parent
from lorikeet.pauses import doubling
from protos.base import BaseModelInfo

logger = logging.getLogger(__name__)

READY_POLL_S = 0.2
BACKOFF_MAX_S = 30.0
PROBES_BEFORE_RESTART = 2
LOG_END_BYTES = 1 << 20
"""How much of a log is read for the reason: one that has served for weeks is long."""


class Ended(Protocol):
    """What is told of each end; True: another start may do better, also the first one's."""

    def __call__(self, cause: str, *, served: bool) -> bool: ...


def _no_one_else(cause: str, *, served: bool) -> bool:
    return False


class VllmProcess:
    """run() supervises until aclose(); wait_ready() says when a (new) vLLM serves."""

    def __init__(
        self,
        settings: EdgeSettings,
        base: BaseModelInfo,
        control_socket: Path,
        *,
        probe_period_s: float = 10,
        probe_deadline_s: float = 60,
        ended: Ended = _no_one_else,
    ) -> None:
        self._settings = settings
        self._base = base
        self._socket = control_socket.absolute()
        self._control = ControlClient(self._socket)
        self._probe_period_s = probe_period_s
        self._probe_deadline_s = probe_deadline_s
        self._ended = ended
        self._doorway = Doorway(settings.serving)
        self._process: asyncio.subprocess.Process | None = None
        self._log = settings.data_dir / "logs" / "vllm.log"
        self._ready = asyncio.Event()
        self._served_once = False
        self._failure: ServingError | None = None
        self._closing = asyncio.Event()
        self._problems = Problems(settings.data_dir)
        self._ready_at: float | None = None
        """When the vLLM that runs, or ran last, began to serve; None: not yet."""
        self._steady_after_s = calm_s(0)
        self.generation = 0

    @property
    def pid(self) -> int | None:
        """Process id of the running vLLM, None between two."""
        return (
            self._process.pid
            if self._process is not None and self._process.returncode is None
            else None
        )

    def command(self) -> list[str]:
        """The command line of vLLM; raises ServingError when no usable vLLM is installed."""
        return serving_command(self._settings, self._base, on_cpu=runs_on_cpu())

    async def run(self) -> None:
        """Starts, watches, restarts vLLM until aclose(); ServingError if it cannot start once."""
        pauses = doubling(1.0, BACKOFF_MAX_S)
        try:
            if problem := start_problem(self._settings.serving) or socket_problem(self._socket):
                raise ServingError(problem)
            if self._settings.serving.is_open_to_others:
                logger.warning(
                    "Everybody who reaches the endpoint may ask and teach this node",
                    extra={"EDGE_SERVING__ACCESS": "open", "host": self._settings.serving.host},
                )
            self._doorway.open()
            await self._doorway.answer()
            while not self._closing.is_set():
                started = time.monotonic()
                try:
                    await self._start()
                    cause = await self._watch()
                except OSError as error:  # disk full, no process left: one that served waits
                    if not self._served_once:
                        raise
                    cause = str(error)
                finally:
                    self._ready.clear()
                    await self._doorway.answer()
                    await self._kill_group()
                if self._closing.is_set():
                    return
                another = self._process is not None and self._ended(
                    cause, served=self._ready_at is not None
                )
                if not self._served_once and not another and not cause.startswith("killed"):
                    raise ServingError(
                        f"vLLM did not start: {cause}. {self._said(cause)}See {self._log}."
                    )
                self._steady_after_s = calm_s(
                    0 if self._ready_at is None else time.monotonic() - self._ready_at
                )
                self._problems.report(
                    "serving",
                    f"vLLM ended and is started again: {cause}. {self._said(cause)}",
                    _next_step(cause),
                )
                if time.monotonic() - started > 2 * BACKOFF_MAX_S:
                    pauses = doubling(1.0, BACKOFF_MAX_S)
                pause_s = next(pauses)
                logger.warning(
                    "vLLM is being restarted", extra={"cause": cause, "pause_s": pause_s}
                )
                await self._pause(pause_s)
        except (ServingError, OSError) as error:
            self._failure = error if isinstance(error, ServingError) else None
            self._problems.report(
                "serving",
                str(error),
                f"Mend what it says, then start `edge-node serve`; see {self._log}.",
            )
            raise
        finally:
            try:
                await self._doorway.aclose()
            finally:  # last: who waits must not end before this does, whose error tells the reason
                self._failure = self._failure or ServingError("vLLM was stopped.")
                self._ready.set()

    async def wait_ready(self) -> int:
        """The start number of the vLLM that serves now; ServingError when there will be none."""
        while True:
            await self._ready.wait()
            if self._failure is not None:
                raise self._failure
            if self.pid is not None:
                return self.generation
            self._ready.clear()  # it has just died, and run() has not noticed yet

    async def aclose(self) -> None:
        """Drains, then SIGTERM, then SIGKILL; idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        await self._doorway.answer()  # who comes from now on is told so
        if self._ready.is_set():
            try:
                async with asyncio.timeout(SHUTDOWN_TIMEOUT_S):
                    await self._control.drain()
            except (TimeoutError, ServingError) as error:
                logger.warning("vLLM did not drain", extra={"cause": repr(error)})
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(SHUTDOWN_TIMEOUT_S + 5):
                await process.wait()
        except TimeoutError:
            logger.warning("vLLM did not stop and is killed")
        await self._kill_group()

    async def _start(self) -> None:
        on_cpu = runs_on_cpu()
        command = serving_command(self._settings, self._base, on_cpu=on_cpu)
        environment = serving_environment(
            self._settings, self._socket, os.environ, command=command, on_cpu=on_cpu
        )
        give_room(self._settings.data_dir)
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            if self._log.exists():
                self._log.replace(self._log.with_suffix(".log.1"))
            log = self._log.open("wb")
        except OSError as error:
            raise StorageError(
                f"Log {self._log} cannot be written: {error}. Check EDGE_DATA_DIR."
            ) from error
        self._process = self._ready_at = None
        self._socket.unlink(missing_ok=True)
        forget_loading(self._settings.data_dir)
        environment[LISTEN_VARIABLE] = str(self._doorway.fd)
        with log:
            # A session of its own: Ctrl-C reaches the supervisor only, which drains first, and the
            # group can be killed whole.
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-E", parent.__file__, str(os.getpid()), *command,
                env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, pass_fds=(self._doorway.fd,),
            )  # fmt: skip
        self.generation += 1
        logger.info("vLLM started", extra={"pid": self._process.pid, "generation": self.generation})

    async def _watch(self) -> str:
        """Returns why this vLLM is over; it may still run."""
        assert self._process is not None
        exited = asyncio.ensure_future(self._process.wait())
        try:
            deadline = time.monotonic() + self._settings.serving.startup_timeout_s
            while not await self._serves():
                await asyncio.wait({exited}, timeout=READY_POLL_S)
                if exited.done():
                    return _exit_text(exited.result())
                if time.monotonic() > deadline:
                    return f"not ready after {self._settings.serving.startup_timeout_s:g} s"
            self._served_once = True
            await self._doorway.leave()
            self._ready.set()
            logger.info("vLLM is ready", extra={"generation": self.generation})
            misses, self._ready_at = 0, time.monotonic()
            while misses < PROBES_BEFORE_RESTART:
                await asyncio.wait({exited}, timeout=self._probe_period_s)
                if exited.done():
                    return _exit_text(exited.result())
                misses = 0 if await self._alive(exited) or self._closing.is_set() else misses + 1
                if (
                    misses == 0
                    and time.monotonic() - self._ready_at >= self._steady_after_s
                    and not exited.done()
                ):
                    self._problems.clear("serving")
            return f"hung: {misses} probes of {self._probe_deadline_s:g} s without a token"
        finally:
            exited.cancel()

    async def _serves(self) -> bool:
        if not self._socket.exists():
            return False
        try:
            async with asyncio.timeout(self._probe_deadline_s), self._control.requests(1) as vllm:
                return (await vllm.get("/health")).status_code == 200
        except (httpx.HTTPError, OSError):
            return False

    async def _alive(self, exited: asyncio.Future[int]) -> bool:
        probe = asyncio.ensure_future(self._control.probe(self._probe_deadline_s))
        try:
            both: set[asyncio.Future[bool] | asyncio.Future[int]] = {probe, exited}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return exited.done() or probe.result()
        except ServingError:
            return False
        finally:
            probe.cancel()

    async def _kill_group(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            os.killpg(
                process.pid, signal.SIGKILL
            )  # its engine core too, which outlives a killed API server
        except ProcessLookupError:
            pass
        await process.wait()
        self._socket.unlink(missing_ok=True)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._closing.wait()
        except TimeoutError:
            pass

    def _said(self, cause: str) -> str:
        """What vLLM's log says of its end.

        Of one that has served it is only kind and place: a message may quote a request.
        """
        served = self._ready_at is not None
        if cause == _KILLED or (served and not cause.startswith("it exited")):
            return ""  # it had no time to say so: what stands there is about something else
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, self._log.stat().st_size - LOG_END_BYTES))
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        reason = raised_at(text) if served else startup_reason(text)
        return f"Its log says: {reason.removesuffix('.')}. " if reason else ""


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"it exited with code {code}"


_KILLED = _exit_text(-signal.SIGKILL)


def _next_step(cause: str) -> str:
    if cause == _KILLED:
        return (
            "If nobody killed it, the memory ran out: see `dmesg`; "
            "give the node more, or lower EDGE_SERVING__MAX_MODEL_LEN."
        )
    return "See logs/vllm.log.1 in EDGE_DATA_DIR, the log of the one that ended."
