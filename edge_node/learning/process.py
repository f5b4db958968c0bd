"""The supervisor's handle on the learner: starts it, starts it again, stops it.

In: settings. Runs `python -m edge_node.learning.worker` until `aclose`; the child inherits EDGE_* and dies with this
process. A learner that ends is started again after a pause that doubles while it keeps ending soon.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time

from edge_node.settings import EdgeSettings

log = logging.getLogger(__name__)

FIRST_PAUSE_S = 1.0
MAX_PAUSE_S = 60.0
STEADY_S = 60.0
"""A learner that ran this long was healthy: the next pause is short again."""
STOP_S = 10.0

# The learner never talks to a hub or a telemetry service, whatever the libraries would like.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


class LearnerProcess:
    """`run()` until `aclose()`; `pid` is the child's while it runs, and `starts` counts them."""

    def __init__(self, settings: EdgeSettings, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._enabled = settings.learning.enabled
        self._first_pause_s = first_pause_s
        self._child: asyncio.subprocess.Process | None = None
        self._closed = asyncio.Event()
        self.starts = 0

    @property
    def pid(self) -> int | None:
        return None if self._child is None or self._child.returncode is not None else self._child.pid

    def command(self) -> list[str]:
        return [sys.executable, "-m", "edge_node.learning.worker", "--parent", str(os.getpid())]

    async def run(self) -> None:
        """Keep one learner running; returns after `aclose`. Without learning it only waits for that."""
        pause_s = self._first_pause_s
        while self._enabled and not self._closed.is_set():
            began = time.monotonic()
            code = await self._run_once()
            if self._closed.is_set():
                return
            if time.monotonic() - began > STEADY_S:
                pause_s = self._first_pause_s
            log.warning("learner ended", extra={"exit_code": code, "restart_in_s": pause_s})
            try:
                await asyncio.wait_for(self._closed.wait(), pause_s)
            except TimeoutError:
                pause_s = min(pause_s * 2, MAX_PAUSE_S)
        await self._closed.wait()

    async def _run_once(self) -> int:
        try:
            self._child = await asyncio.create_subprocess_exec(*self.command(), env=os.environ | QUIET)
        except OSError as error:  # no memory or no process left: serving goes on, and the learner is tried again
            log.warning("learner not started", extra={"why": str(error)})
            return error.errno or 1
        self.starts += 1
        return await self._child.wait()

    async def aclose(self) -> None:
        """Stop the learner; idempotent. A round in progress goes on from its checkpoint at the next start."""
        self._closed.set()
        if self._child is None or self._child.returncode is not None:
            return
        self._child.terminate()
        try:
            await asyncio.wait_for(self._child.wait(), STOP_S)
        except TimeoutError:
            self._child.kill()
            await self._child.wait()
