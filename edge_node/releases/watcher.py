"""The node's line to central: follows the channel head, hands offers on, reports status.

In: events of FleetService.Watch. Out: the alias on the newest release; status reports; evaluation
offers go to offers.py. A node without central keeps serving the active release and catches up by
itself. vLLM that was started anew gets every kept version again. A failed step is a problem of its
room (edge_node/problems.py) and is tried again: no trouble of the disk, the link, vLLM or an
environment ends the supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import grpc

from edge_node import __version__
from edge_node.errors import StorageError
from edge_node.figures.tally import TALLY, note_heard
from edge_node.problems import Problems
from edge_node.releases.canary import Canary
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.loaded import LoadedReleases, Proves
from edge_node.releases.offers import OfferedEvaluations
from edge_node.releases.own import OwnAdapter
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore
from edge_node.releases.trouble import (
    CHECK_CENTRAL,
    RETRY_FIRST_S,
    RETRY_LAST_S,
    UNREACHABLE,
    next_step,
    words,
)
from edge_node.releases.way_back import while_it_holds
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from lorikeet import traces
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)

STATUS_PERIOD_S = 5.0
LOOK_PERIOD_S = 1.0
"""A vLLM that was started anew is noticed within this period, a new head at once."""
HEAD_RETRY_LAST_S = 30.0
"""A head that fails again and again, each time perhaps after its download."""


class Serving(Protocol):
    """What the watcher needs of the vLLM child."""

    generation: int

    async def wait_ready(self) -> int: ...


class ReleaseWatcher:
    """Long-lived: `run()` until cancelled."""

    def __init__(
        self,
        settings: EdgeSettings,
        channel: grpc.aio.Channel,
        store: ReleaseStore,
        vllm: Serving,
        control: ControlClient,
        evaluator: Evaluator,
        counts: Callable[[], fleet_pb2.NodeStatus],
        pinned: Callable[[], Iterable[str]],
        proof: Proves | None = None,
        probation: Probation | None = None,
    ) -> None:
        """`counts`: of outbox and experience; `pinned`: where unfinished rounds start from.

        `proof`: None compares nothing (EDGE_RELEASES__PROOF=off). `probation`: which vLLM's
        supervisor tells of each end; None: nobody does.
        """
        self._proof = proof
        self._settings = settings
        self._store = store
        self._vllm = vllm
        self._control = control
        self._evaluator = evaluator
        self._counts = counts
        self._pinned = pinned
        self._probation = probation or Probation(settings, store)
        self._fleet = fleet_pb2_grpc.FleetServiceStub(channel)
        self._head: releases_pb2.SignedManifest | None = None
        self._head_changed = asyncio.Event()
        self._spare = asyncio.Event()
        self._problems = Problems(settings.data_dir)
        self._loaded = LoadedReleases(settings, channel, store, control, self._probation, proof)
        self._offers = OfferedEvaluations(
            settings, channel, vllm.wait_ready, evaluator, self._loaded.obtain_name, self._spare.set
        )
        self._canary = Canary(
            store, control, self._probation, self._problems,
            self._loaded.obtain_proved, self._loaded.name_of,
        )  # fmt: skip
        self._head_problem = ""
        """Why the head is not served. It judges canaries: it knows nothing of a former process."""

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for step in self._steps():
                    group.create_task(step(), name=getattr(step, "__qualname__", repr(step)))
        finally:
            if self._proof is not None:
                await self._proof.aclose()

    def _steps(self) -> list[Callable[[], Coroutine[Any, Any, None]]]:
        steps: list[Callable[[], Coroutine[Any, Any, None]]] = [
            self._watch, self._follow, self._offers.run, self._collect, self._report,
        ]  # fmt: skip
        if self._settings.releases.has_canary:
            steps.append(partial(self._canary.run, self._vllm.wait_ready, self._stable))
        if self._settings.releases.may_serve_own:
            ready = self._vllm.wait_ready
            steps.append(OwnAdapter(self._settings, self._control, ready, self._loaded.served).run)
        return steps

    def _stable(self, generation: int) -> releases_pb2.SignedManifest | None:
        """The head, once this vLLM serves it: a canary goes when stable has taken its place."""
        head = self._head
        is_served = head and self._store.check(head).digest == self._loaded.served(generation)
        return head if is_served else None

    async def _watch(self) -> None:
        pause = RETRY_FIRST_S
        while True:
            call, heard = None, False
            try:
                status = await asyncio.to_thread(self._status)
                call = self._fleet.Watch(fleet_pb2.WatchRequest(status=status))
                while True:
                    event = await asyncio.wait_for(
                        call.read(), self._settings.central.call_timeout_s
                    )
                    if not isinstance(event, fleet_pb2.WatchResponse):  # end of the stream
                        break
                    self._take(event)
                    note_heard(self._settings.data_dir)
                    pause, heard = RETRY_FIRST_S, True
                    self._problems.clear("central")
                if not heard:
                    self._lost_central("it ended the connection without a word")
            except TimeoutError:
                self._lost_central(f"silent for {self._settings.central.call_timeout_s:g} s")
            except grpc.aio.AioRpcError as error:
                self._lost_central(words(error), next_step(error))
            except Exception as error:  # supervision: the link is made again, whatever broke it
                text = f"The line to central broke on this node's side: {words(error)}"
                self._problems.report("central-news", text, next_step(error))
            finally:
                if call is not None:
                    call.cancel()
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST_S)

    def _lost_central(self, why: str, then: str = CHECK_CENTRAL) -> None:
        address = self._settings.central.address
        self._problems.report(
            "central", f"Central at {address} cannot be heard ({why}); tried again.", then
        )

    def _take(self, event: fleet_pb2.WatchResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "head" and event.head.channel == self._settings.releases.channel:
            self._head = event.head.head
            self._head_changed.set()
        elif kind == "head" and self._settings.releases.has_canary:
            self._canary.head = event.head.head
        elif kind == "standing":
            self._store.keep_standing(event.standing.quarantine)
            if event.standing.quarantine:
                text = f"Central keeps this node's updates aside: {event.standing.quarantine}."
                self._problems.report(
                    "quarantine",
                    text,
                    "Ask the operator of central: `central nodes release` ends it.",
                )
            else:
                self._problems.clear("quarantine")
        elif kind == "train":
            offer = event.train
            self._store.keep_offer(offer.offer_id, offer.max_rank, offer.encodings)
        elif kind == "heartbeat":  # all that was sent before it was kept
            self._problems.clear("central-news")
        elif kind == "evaluation" and self._settings.releases.evaluate:
            self._offers.add(event.evaluation)

    async def _follow(self) -> None:
        """Keep the alias on the head; load everything again into a vLLM that was started anew."""
        pause, failed = RETRY_FIRST_S, None
        while True:
            # Raises when there will be none: then the node ends anyway.
            generation = await self._vllm.wait_ready()
            self._head_changed.clear()
            head = self._head
            try:
                await self._settle(head, generation)
            except Exception as error:  # supervision: the active release goes on being served
                self._head_problem = words(error)
                channel = self._settings.releases.channel
                text = f"The release of channel {channel!r} is not served: {words(error)}"
                self._problems.report("releases", text, next_step(error))
                pause = min(2 * pause, HEAD_RETRY_LAST_S) if head == failed else RETRY_FIRST_S
                period, failed = pause, head
            else:
                # Without central only what failed here is over.
                if head is not None or self._head_problem:
                    self._problems.clear("releases")
                self._head_problem = ""
                period, pause = LOOK_PERIOD_S, RETRY_FIRST_S
            try:
                await asyncio.wait_for(self._head_changed.wait(), period)
            except TimeoutError:
                pass

    async def _settle(self, head: releases_pb2.SignedManifest | None, generation: int) -> None:
        loaded = self._loaded
        if generation != loaded.generation:
            await loaded.load_kept(generation, damage_matters=head is None)
        if loaded.pointed and self._vllm.generation == generation:
            self._probation.serves(loaded.pointed)
        if head is None:
            return
        digest = self._store.check(head).digest
        if self._canary.head is not None or not self._settings.releases.has_canary:
            self._probation.named([digest, *self._canary.named])
        if digest == loaded.pointed:
            return
        began = time.monotonic()
        release = await while_it_holds(
            loaded.obtain_proved(head), self._head_changed, lambda: self._head == head
        )
        if release is None:
            return
        await asyncio.to_thread(self._probation.switching, release)
        await loaded.point(release)
        TALLY.switched(took_s := time.monotonic() - began)
        subject = release.release_id
        traces.after("switch", subject, took_s, release_id=subject, release=release.label)
        log.info("serving release", extra={"release": release.label})
        self._spare.set()

    async def _collect(self) -> None:
        """Unload and delete old versions.

        Apart from `_follow`, because a long answer on one may hold this up.
        """
        while True:
            await self._spare.wait()
            self._spare.clear()
            try:
                for release in self._store.newest()[self._settings.releases.keep :]:
                    async with self._loaded.lock(release.release_id):
                        if release.release_id not in await asyncio.to_thread(self._needed):
                            await self._loaded.unload(release)
                            await asyncio.to_thread(self._store.remove, release)
                self._problems.clear("old-releases")
            except Exception as error:  # supervision: it is still there at the next chance
                text = f"Old releases cannot be removed, and fill the disk: {words(error)}"
                self._problems.report("old-releases", text, next_step(error))

    def _needed(self) -> set[str]:
        active = self._store.active()
        return {
            self._loaded.pointed,
            *([active.release_id] if active else []),
            *([self._store.check(self._head).digest] if self._head else []),
            *self._canary.named,
            self._canary.release_id,
            *self._probation.needed,
            *self._offers.in_use,
            *self._pinned(),
        }

    async def _report(self) -> None:
        while True:
            try:
                status = await asyncio.to_thread(self._status)
                await self._fleet.ReportStatus(
                    fleet_pb2.ReportStatusRequest(status=status),
                    timeout=self._settings.central.call_timeout_s,
                )
                self._problems.clear("status")
            except Exception as error:  # supervision: a full disk must not end serving
                # A central that cannot be reached is the watch's trouble.
                if not (isinstance(error, grpc.aio.AioRpcError) and error.code() in UNREACHABLE):
                    text = f"This node's status cannot be told to central: {words(error)}"
                    self._problems.report("status", text, next_step(error))
            await asyncio.sleep(STATUS_PERIOD_S)

    def _status(self) -> fleet_pb2.NodeStatus:
        """Reads the stores: not for the event loop."""
        status = self._counts()
        try:
            active = self._store.active()
        except StorageError:  # `_follow` says so
            active = None
        status.serving_release_id = active.release_id if active else ""
        status.channel = self._settings.releases.channel
        status.release_problem = self._release_problem()
        status.software_version = __version__
        status.environments.extend(sorted(self._evaluator.environments))
        status.problems.extend(
            fleet_pb2.Problem(**asdict(problem)) for problem in self._problems.current()
        )
        return status

    def _release_problem(self) -> str:
        """Why the channel's head is not served as it should.

        A canary that does this to a node is not ready for the others.
        """
        generation = self._loaded.generation
        if generation and self._vllm.generation != generation:
            return "vLLM was started anew and has not loaded the release yet"
        return self._head_problem
