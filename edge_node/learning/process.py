"""The supervisor's handle on the learner: starts it, starts it again, stops it.

In: settings. Runs `python -m edge_node.learning.worker` until `aclose`; the child inherits EDGE_*
and dies with this process. A learner that ends is started again after a pause that doubles while
it keeps ending soon; one that hangs (beat.py) is ended first. It is the problem of room `learner`
until one has run for a while (problems.calm_s). What it prints goes on to this process's stderr.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress

from edge_node.learning.beat import LOOK_S, SILENT_S, Beat, Silence
from edge_node.problems import Problems, calm_s
from edge_node.settings import EdgeSettings
from lorikeet.pauses import doubling

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STEADY_S = 60.0
"""A learner that ran this long was healthy: the next pause is short again."""
STOP_S = 10.0
LAST_WORDS_BYTES = 4096

# The learner never talks to a hub or a telemetry service, whatever the libraries would like.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class LearnerProcess:
    """`run()` until `aclose()`; `pid` is the child's while it runs, and `starts` counts them."""

    def __init__(
        self,
        settings: EdgeSettings,
        first_pause_s: float = FIRST_PAUSE_S,
        silent_after_s: float = SILENT_S,
    ) -> None:
        self._enabled = settings.learning.enabled
        self._first_pause_s = first_pause_s
        self._child: asyncio.subprocess.Process | None = None
        self._closed = asyncio.Event()
        self._problems = Problems(settings.data_dir)
        self._beat = Beat(settings.data_dir)
        self.silent_after_s = silent_after_s
        self._hung = False
        self._steady_after_s = calm_s(0)
        self._last_words = ""
        """The learner's own account of why it ends: the line `learner: ...`; it quotes nobody."""
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return (
            None if self._child is None or self._child.returncode is not None else self._child.pid
        )

    def command(self) -> list[str]:
        return [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())]

    async def run(self) -> None:
        """Keep one learner running until `aclose`; without learning only wait for that."""
        pauses = doubling(self._first_pause_s, MAX_PAUSE_S)
        while self._enabled and not self._closed.is_set():
            began = time.monotonic()
            code = await self._run_once()
            if self._closed.is_set():
                return
            self._steady_after_s = calm_s(time.monotonic() - began, last_s=3600)
            if not self._hung:  # which was reported already
                text = f"The learner ended ({self._why(code)}) and is started again."
                self._problems.report("learner", text, _next_step(code))
            if time.monotonic() - began > STEADY_S:
                pauses = doubling(self._first_pause_s, MAX_PAUSE_S)
            pause_s = next(pauses)
            log.warning("learner ended", extra={"exit_code": code, "restart_in_s": pause_s})
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), pause_s)
        await self._closed.wait()

    async def _run_once(self) -> int:
        self._last_words, self._hung = "", False
        try:
            self._child = await asyncio.create_subprocess_exec(
                *self.command(), env=os.environ | QUIET, stderr=asyncio.subprocess.PIPE
            )
        except OSError as error:  # no memory or no process left: serving goes on, this again later
            log.warning("learner not started", extra={"why": str(error)})
            self._last_words = str(error)
            return error.errno or 1
        self.starts += 1
        assert self._child.stderr is not None
        passing_on = asyncio.create_task(self._pass_on(self._child.stderr))
        steady = asyncio.get_running_loop().call_later(
            self._steady_after_s, self._problems.clear, "learner"
        )
        try:
            if not await self._ends_by_itself(self._child):
                steady.cancel()
                self._report_hanging()
                await self._end(self._child)
            code = await self._child.wait()
            # A process of the learner's own may hold the pipe.
            await asyncio.wait({passing_on}, timeout=STOP_S)
            return code
        finally:
            steady.cancel()
            passing_on.cancel()

    async def _ends_by_itself(self, child: asyncio.subprocess.Process) -> bool:
        """False as soon as it has given no sign of life for too long."""
        silence = Silence(self._beat)
        while await asyncio.to_thread(silence.look) <= self.silent_after_s:
            with suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), LOOK_S)
                return True
        return False

    def _report_hanging(self) -> None:
        self._hung = True
        log.warning("learner hangs", extra={"pid": self.pid, "silent_s": self.silent_after_s})
        self._problems.report(
            "learner",
            f"The learner hung: no sign of life for {self.silent_after_s:g} s. It is ended and "
            "started again; a round goes on from its checkpoint.",
            "Once needs nothing. If it comes again, look at what it waits for: the disk of "
            "EDGE_DATA_DIR or of the base model, the GPU, or a plug-in of EDGE_ENVIRONMENTS.",
        )

    async def _pass_on(self, pipe: asyncio.StreamReader) -> None:
        end = b""
        while piece := await pipe.read(1 << 16):
            with suppress(OSError):  # nobody reads our log: the learner must not wait for that
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
            end = (end + piece)[-LAST_WORDS_BYTES:]
            said = [
                line
                for line in end.decode(errors="replace").splitlines()
                if line.startswith("learner: ")
            ]
            self._last_words = said[-1].removeprefix("learner: ") if said else self._last_words

    def _why(self, code: int) -> str:
        if self._last_words:
            return self._last_words
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def aclose(self) -> None:
        """Stop the learner; idempotent. The next start goes on from a round's checkpoint."""
        self._closed.set()
        if self._child is not None:
            await self._end(self._child)

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        for stop in (child.terminate, child.kill):
            if child.returncode is None:
                stop()
                with suppress(TimeoutError):
                    await asyncio.wait_for(child.wait(), STOP_S)


def _next_step(code: int) -> str:
    if code == -signal.SIGKILL:
        return (
            "If nobody killed it, the memory ran out: give the node more, or set "
            "EDGE_LEARNING__BATCH_TOKENS lower and EDGE_LEARNING__GRADIENT_CHECKPOINTING to true. "
            "The round goes on with them."
        )
    return "Mend what it says; the log of `edge-node serve` has more. Serving goes on meanwhile."
