"""The canary inside a node: a part of its requests gets the canary channel's release.

In: the heads of both channels, as central names them. Out: the canary in vLLM's alias table, or
none. It is none while both channels have the same head. What keeps the canary away is the problem
of room `canary`; the alias goes on as if there were none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from edge_node.problems import Problems
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.releases.trouble import RETRY_LAST_S, next_step, words
from edge_node.serving import ControlClient
from lorikeet.pauses import doubling
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 1.0
Signed = releases_pb2.SignedManifest


class Canary:
    """Long-lived: `run` until cancelled. It waits for the canary's download apart from stable."""

    def __init__(
        self,
        store: ReleaseStore,
        control: ControlClient,
        probation: Probation,
        problems: Problems,
        obtain: Callable[[Signed], Awaitable[StoredRelease]],
        served_name: Callable[[StoredRelease], str],
    ) -> None:
        """`obtain` brings a release onto the disk and into vLLM."""
        self._store = store
        self._control = control
        self._probation = probation
        self._problems = problems
        self._obtain = obtain
        self._served_name = served_name
        self._generation = 0
        self.head: Signed | None = None
        """As central named it last; None: not yet."""
        self.release_id = ""
        """What is served to a part of the requests; empty: nothing."""

    @property
    def named(self) -> list[str]:
        """The head's id, once there is one. Raises AdapterError."""
        return [self._store.check(self.head).digest] if self.head else []

    async def run(
        self,
        vllm_ready: Callable[[], Awaitable[int]],
        stable: Callable[[int], Signed | None],
    ) -> None:
        """`vllm_ready`: the start number of the vLLM that serves; `stable`: the head it serves."""
        pauses, failed = doubling(LOOK_PERIOD_S, RETRY_LAST_S), None
        while True:
            generation = await vllm_ready()
            if (head := stable(generation)) is None or await self.follow(head, generation):
                failed = None
            elif failed != self.head:
                pauses, failed = doubling(LOOK_PERIOD_S, RETRY_LAST_S), self.head
            await self._pause(next(pauses) if failed else LOOK_PERIOD_S, failed)

    async def _pause(self, seconds: float, head: Signed | None) -> None:
        """Shorter where central names another head than `head`, which failed."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and (head is None or head == self.head):
            await asyncio.sleep(min(left, LOOK_PERIOD_S))

    async def follow(self, stable: Signed, generation: int) -> bool:
        """Bring the alias table to the head. `stable`: the other channel's head. Raises nothing.

        False: it failed, each time perhaps after a load and a proof.
        """
        if generation != self._generation:  # another vLLM, which has no canary
            self._generation, self.release_id = generation, ""
        try:
            await self._follow(stable)
        except Exception as error:  # supervision: stable goes on being served
            text = f"The release of channel 'canary' gets no request here: {words(error)}"
            self._problems.report("canary", text, next_step(error))
            return False
        return True

    async def _follow(self, stable: Signed) -> None:
        head = self.head
        if head is None or head == stable:
            if self.release_id:
                await self._control.canary(None)
                log.info("no canary any more", extra={"release_id": self.release_id})
            self.release_id = ""
            self._problems.clear("canary")
            return
        if self.release_id and self._store.check(head).digest == self.release_id:
            self._probation.serves(self.release_id)
            return
        release = await self._obtain(head)
        self._probation.trying(release)
        await self._control.canary(self._served_name(release))
        self.release_id = release.release_id
        self._problems.clear("canary")
        log.info("canary gets requests", extra={"release": release.label})
