"""The node's line to central: follows the channel head, answers evaluation offers, reports status.

In: events of FleetService.Watch. Out: the alias on the newest release; evaluation and status reports. A node without
central keeps serving the active release and catches up by itself. vLLM that was started anew gets every kept version
again. A failed step is logged once, shown in the status, and tried again with the next watch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import grpc

from edge_node import __version__
from edge_node.errors import EdgeError, ServingError
from edge_node.releases.download import fetch_release
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving import ControlClient
from edge_node.settings import EdgeSettings
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

log = logging.getLogger(__name__)

STATUS_PERIOD_S = 5.0
RETRY_FIRST_S = 0.5
RETRY_LAST_S = 5.0
EVALUATION_TRIES = 3


class Serving(Protocol):
    """What the watcher needs of the vLLM child."""

    generation: int

    async def wait_ready(self) -> int: ...


class ReleaseWatcher:
    """Long-lived: `run()` until cancelled or `aclose()`."""

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
    ) -> None:
        """`counts` gives outbox and experience counts; `pinned` the releases that unfinished rounds start from."""
        self._settings = settings
        self._channel = channel
        self._store = store
        self._vllm = vllm
        self._control = control
        self._evaluator = evaluator
        self._counts = counts
        self._pinned = pinned
        self._fleet = fleet_pb2_grpc.FleetServiceStub(channel)
        self._releases = releases_pb2_grpc.ReleaseServiceStub(channel)
        self._head: releases_pb2.SignedManifest | None = None
        self._head_changed = asyncio.Event()
        self._evaluations: asyncio.Queue[fleet_pb2.EvaluationOffer] = asyncio.Queue()
        self._known_offers: set[str] = set()
        self._evaluating: tuple[str, ...] = ()
        self._problem = ""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for step in (self._watch, self._follow, self._evaluate, self._report):
                group.create_task(step(), name=step.__name__)

    async def _watch(self) -> None:
        pause = RETRY_FIRST_S
        while True:
            try:
                call = self._fleet.Watch(fleet_pb2.WatchRequest(status=self._status()))
                while True:
                    event = await asyncio.wait_for(call.read(), self._settings.central.call_timeout_s)
                    if not isinstance(event, fleet_pb2.WatchResponse):  # end of the stream
                        break
                    pause = RETRY_FIRST_S
                    self._take(event)
            except TimeoutError:
                self._note("central: silent")
            except grpc.aio.AioRpcError as error:
                self._note(_words(error, "central: "))
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST_S)

    def _take(self, event: fleet_pb2.WatchResponse) -> None:
        kind = event.WhichOneof("event")
        if kind == "head" and event.head.channel == self._settings.releases.channel:
            self._head = event.head.head
            self._head_changed.set()
        elif kind == "train":
            self._store.keep_offer(event.train.offer_id, event.train.max_rank)
        elif kind == "evaluation" and self._settings.releases.evaluate:
            self._enqueue(event.evaluation)
        if self._problem.startswith("central: "):
            self._note("")

    def _enqueue(self, offer: fleet_pb2.EvaluationOffer) -> None:
        """A new watch brings every open offer again; each is evaluated once."""
        if offer.offer_id not in self._known_offers:
            self._known_offers.add(offer.offer_id)
            self._evaluations.put_nowait(offer)

    async def _follow(self) -> None:
        """Keep the alias on the head; load everything again into a vLLM that was started anew."""
        loaded_generation = 0
        while True:
            generation = await self._vllm.wait_ready()
            try:
                if generation != loaded_generation:
                    await self._load_kept()
                    loaded_generation = generation
                if self._head is not None:
                    await self._switch(self._head)
            except (EdgeError, grpc.aio.AioRpcError, TimeoutError) as error:
                self._note(_words(error, "release: "))
                await asyncio.sleep(RETRY_FIRST_S)
                continue
            self._head_changed.clear()
            try:
                # A new vLLM is noticed within this period, a new head at once.
                await asyncio.wait_for(self._head_changed.wait(), 1.0)
            except TimeoutError:
                pass

    async def _switch(self, head: releases_pb2.SignedManifest) -> None:
        manifest = self._store.check(head)
        active = self._store.active()
        if active is not None and active.release_id == manifest.digest:
            return
        release = await fetch_release(self._channel, self._store, head, self._settings.central.call_timeout_s)
        await self._control.load(self.served_name(release), release.path)
        # Named first, pointed second: a vLLM that starts in between serves what the alias is about to serve.
        await asyncio.to_thread(self._store.activate, release)
        await self._control.point(self.served_name(release))
        log.info("serving release", extra={"release": release.label})
        if self._problem.startswith("release: "):
            self._note("")
        await self._collect(release)

    def served_name(self, release: StoredRelease) -> str:
        """The exact version's model name."""
        return f"{self._settings.serving.alias}@{release.label}"

    async def _load_kept(self) -> None:
        for release in self._store.newest()[: self._settings.releases.keep]:
            await self._control.load(self.served_name(release), release.path)
        active = self._store.active()
        if active is not None:
            await self._control.point(self.served_name(active))

    async def _collect(self, active: StoredRelease) -> None:
        needed = {active.release_id, *self._evaluating, *self._pinned()}
        for release in self._store.newest()[self._settings.releases.keep :]:
            if release.release_id not in needed:
                await self._control.unload(self.served_name(release))
                await asyncio.to_thread(self._store.remove, release)

    async def _evaluate(self) -> None:
        while True:
            offer = await self._evaluations.get()
            try:
                report = await asyncio.wait_for(self._compare_with_retries(offer), offer.deadline_s)
            except (EdgeError, grpc.aio.AioRpcError, TimeoutError) as error:
                log.warning("evaluation failed", extra={"offer": offer.offer_id, "why": _words(error)})
                report = releases_pb2.ReportEvaluationRequest(offer_id=offer.offer_id, abstain_reason=_words(error))
            finally:
                self._evaluating = ()
            await self._send_report(report)

    async def _compare_with_retries(self, offer: fleet_pb2.EvaluationOffer) -> releases_pb2.ReportEvaluationRequest:
        """A vLLM that died or a link that broke in the middle costs a new start, not a result."""
        for _ in range(EVALUATION_TRIES - 1):
            try:
                return await self._compare(offer)
            except (ServingError, grpc.aio.AioRpcError) as error:
                log.warning("evaluation starts again", extra={"offer": offer.offer_id, "why": _words(error)})
                await asyncio.sleep(RETRY_FIRST_S)
        return await self._compare(offer)

    async def _send_report(self, report: releases_pb2.ReportEvaluationRequest) -> None:
        pause = RETRY_FIRST_S
        while True:
            try:
                await self._releases.ReportEvaluation(report, timeout=self._settings.central.call_timeout_s)
                return
            except grpc.aio.AioRpcError as error:
                self._note(_words(error, "central: "))
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return  # refused, for example because the verdict is there already
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_LAST_S)

    async def _compare(self, offer: fleet_pb2.EvaluationOffer) -> releases_pb2.ReportEvaluationRequest:
        names = []
        self._evaluating = tuple(self._store.check(signed).digest for signed in (offer.candidate, offer.reference))
        await self._vllm.wait_ready()
        for signed in (offer.candidate, offer.reference):
            release = await fetch_release(self._channel, self._store, signed, self._settings.central.call_timeout_s)
            await self._control.load(self.served_name(release), release.path)
            names.append(self.served_name(release))
        results = await self._evaluator.compare(names[0], names[1], offer.tasks)
        return releases_pb2.ReportEvaluationRequest(offer_id=offer.offer_id, results=results)

    async def _report(self) -> None:
        while True:
            try:
                await self._fleet.ReportStatus(
                    fleet_pb2.ReportStatusRequest(status=self._status()), timeout=self._settings.central.call_timeout_s
                )
            except grpc.aio.AioRpcError:
                pass  # the watch shows and logs the same trouble
            await asyncio.sleep(STATUS_PERIOD_S)

    def _status(self) -> fleet_pb2.NodeStatus:
        status = self._counts()
        active = self._store.active()
        status.serving_release_id = active.release_id if active else ""
        status.software_version = __version__
        status.environments.extend(sorted(self._evaluator.environments))
        status.problem = self._problem
        return status

    def _note(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            if problem:
                log.warning("trouble", extra={"problem": problem})
            else:
                log.info("recovered")


def _words(error: Exception, prefix: str = "") -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{prefix}{error.code().name}: {error.details()}"
    return prefix + (str(error) or type(error).__name__)
