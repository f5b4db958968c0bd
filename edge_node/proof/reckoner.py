"""The supervisor's handle on the process that makes references.

In: orders. Out: what `reckoning.py` answers, or NoReference with the reason. The process is
started when it is needed, ends when nobody asks it for a while, and dies with this one. It has a
deadline, a low priority, and no GPU.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from edge_node.proof.references import NoReference
from lorikeet import parent

log = logging.getLogger(__name__)

IDLE_S = 120.0
"""How long it keeps the base in memory for the next release. Its start takes seconds."""
DEADLINE_S = 900.0
"""Of one reference, the start of the process included."""
ANSWER_BYTES = 8 << 20
"""Longest answer: 8 canaries are about 40 kB."""
COMMAND = (sys.executable, "-m", "edge_node.proof.reckoning")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",  # vLLM has the GPU's memory
    "PYTHONSAFEPATH": "1",
}


class Reckoner:
    """`ask` one after the other; `aclose` ends the process."""

    def __init__(
        self,
        *,
        idle_s: float = IDLE_S,
        deadline_s: float = DEADLINE_S,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._command = command
        self._idle_s = idle_s
        self._deadline_s = deadline_s
        self._child: asyncio.subprocess.Process | None = None
        self._ending: asyncio.TimerHandle | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        child = self._child
        return None if child is None or child.returncode is not None else child.pid

    async def ask(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises NoReference."""
        if self._ending is not None:
            self._ending.cancel()
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await self._exchange(json.dumps(order).encode() + b"\n")
        except TimeoutError as error:
            self._end()
            raise NoReference(
                f"PEFT's reference was not made within {self._deadline_s:g} s"
            ) from error
        except BaseException:  # cancelled in between: its answer would be the next order's
            self._end()
            raise
        self._ending = asyncio.get_running_loop().call_later(self._idle_s, self._end)
        if "problem" in answer:
            raise NoReference(f"PEFT's reference could not be made: {answer['problem']}")
        reference: Mapping[str, Any] = answer["reference"]
        return reference

    async def aclose(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
        child = self._child
        self._end()
        if child is not None:
            await child.wait()

    async def _exchange(self, line: bytes) -> dict[str, Any]:
        try:
            if self.pid is None:
                await self._start()
            assert self._child is not None
            assert self._child.stdin is not None
            assert self._child.stdout is not None
            self._child.stdin.write(line)
            await self._child.stdin.drain()
            answer = await self._child.stdout.readline()
        except (OSError, ValueError) as error:  # no process left, a broken pipe, an endless line
            self._end()
            raise NoReference(f"the process that makes references failed: {error!r}") from error
        if not answer.endswith(b"\n"):
            code = await self._child.wait()
            self._child = None
            raise NoReference(
                f"the process that makes references ended with {code}; by SIGKILL, memory ran out"
            )
        document: dict[str, Any] = json.loads(answer)
        return document

    async def _start(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("EDGE_")
        }
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-E", parent.__file__, str(os.getpid()),
            *self._command,
            env=environment | QUIET, limit=ANSWER_BYTES, start_new_session=True,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        self.starts += 1

    def _end(self) -> None:
        # Forgotten at once: a process that was killed looks alive until it is reaped.
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            child.kill()  # it keeps nothing
