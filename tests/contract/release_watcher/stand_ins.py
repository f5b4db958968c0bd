"""A central that misbehaves on purpose, a vLLM that only remembers, and a watcher between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from edge_node.problems import Problem, Problems
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.loaded import Proves
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.settings import EdgeSettings, EnvironmentSpec
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.releases.v1 import releases_pb2, releases_pb2_grpc
from tests.fakes.endpoint import at


@dataclass
class Central(releases_pb2_grpc.ReleaseServiceServicer, fleet_pb2_grpc.FleetServiceServicer):
    """Plays its events, cuts the first download in the middle, and remembers what it was asked."""

    payload: bytes
    events: list[fleet_pb2.WatchResponse] = field(default_factory=list)
    cuts: int = 1
    offsets: list[int] = field(default_factory=list)
    reports: list[releases_pb2.ReportEvaluationRequest] = field(default_factory=list)
    watches: int = 0

    async def Download(self, request, context):
        self.offsets.append(request.offset)
        rest = self.payload[request.offset :]
        yield releases_pb2.DownloadResponse(chunk=rest[:100])
        if self.cuts:
            self.cuts -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        yield releases_pb2.DownloadResponse(chunk=rest[100:])

    async def ReportEvaluation(self, request, context):
        self.reports.append(request)
        return releases_pb2.ReportEvaluationResponse()

    async def ReportStatus(self, request, context):
        return fleet_pb2.ReportStatusResponse()

    async def Watch(self, request, context):
        self.watches += 1
        for event in self.events:
            yield event
        if self.watches == 1:
            return  # the link breaks; the node must come again
        await asyncio.Event().wait()


class Control:
    """Stands for vLLM's control socket: keeps what was loaded and where the alias points."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
        assert (path / "adapter_config.json").is_file()
        self.calls.append(("load", name))

    async def expect_held(self, name: str) -> None:
        return None

    async def point(self, name: str) -> None:
        self.calls.append(("point", name))

    async def canary(self, name: str | None) -> None:
        self.calls.append(("canary", name or ""))

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))


class Vllm:
    generation = 1

    async def wait_ready(self) -> int:
        return self.generation


Connect = Callable[[Central], Awaitable[grpc.aio.Channel]]


def head_event(
    signed: releases_pb2.SignedManifest, channel: str = "stable"
) -> fleet_pb2.WatchResponse:
    return fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel=channel, head=signed))


def evaluation_event(
    signed: releases_pb2.SignedManifest, reference: releases_pb2.SignedManifest
) -> Any:
    offer = fleet_pb2.EvaluationOffer(
        offer_id="o1", candidate=signed, reference=reference, tasks=3, deadline_s=20
    )
    return fleet_pb2.WatchResponse(evaluation=offer)


class Idle:
    """An environment without tasks: candidate and reference are loaded, and nothing is asked."""

    def tasks(self, split: str, *, count: int, seed: int) -> list[Any]:
        return []

    def verify(self, task: Any, answer: str) -> Any:
        raise AssertionError("there is no task to verify")

    def reference_answer(self, task: Any) -> str | None:
        return None


IDLE = {"idle": (EnvironmentSpec(name="idle", factory="x:Y"), Idle)}


@asynccontextmanager
async def watching(
    store: ReleaseStore,
    channel: grpc.aio.Channel,
    control: Control,
    environments: Any = IDLE,
    evaluation_url: str = "http://127.0.0.1:9",
    probation: Probation | None = None,
    proof: Proves | None = None,
    made: list[ReleaseWatcher] | None = None,
    **settings: Any,
) -> AsyncIterator[asyncio.Task[None]]:
    """`made`: gets the watcher."""
    watcher = ReleaseWatcher(
        EdgeSettings(data_dir=store.partial("x").parents[2], **settings),
        channel,
        store,
        Vllm(),
        control,  # type: ignore[arg-type]
        Evaluator(at(evaluation_url), dict(environments)),
        fleet_pb2.NodeStatus,
        tuple,
        proof=proof,
        probation=probation,
    )
    if made is not None:
        made.append(watcher)
    task = asyncio.create_task(watcher.run())
    try:
        yield task
        assert not task.done(), task.result()
    finally:
        task.cancel()


def trouble(store: ReleaseStore) -> dict[str, Problem]:
    """What the node says is wrong, by room."""
    return {problem.room: problem for problem in Problems(store.partial("x").parents[2]).current()}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.02)
