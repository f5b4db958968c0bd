"""The quickstart's story: who asks what of which node, when it is enough, and what came of it.

In: a running System. Out: a record for each node (success before, after and in every wave; what was asked and failed)
and the newest snapshot of central. Guarantees: nodes are only reached through their public endpoints; learning is
driven by nothing but requests and feedback; the story ends when the targets hold and nothing is on its way any more,
or at a stated limit, and says which.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import httpx

from edge_node.environments import Environment, Task
from examples.quickstart import scale
from examples.quickstart.environments import CompanyApi, PublicTenants
from examples.quickstart.operator_view import OperatorView, Snapshot
from examples.quickstart.scale import Size
from examples.quickstart.system import ALIAS, NodePlan, System
from examples.quickstart.traffic import Counts, Measurement, measure, send_wave

POLL_S = 0.5


@dataclass(frozen=True)
class Point:
    """One success rate, on one exact release when `release` has one label."""

    at_s: float
    kind: str
    """before | wave | after | anchor"""
    release: str
    passed: int
    total: int

    @property
    def percent(self) -> float:
        return 100.0 * self.passed / self.total if self.total else 0.0


@dataclass
class NodeRecord:
    """What the driver saw of one node."""

    plan: NodePlan
    state: str = "starting"
    serving: str = ""
    """Label of the release that the alias points at."""
    served: list[tuple[float, str]] = field(default_factory=list)
    """When each release was first seen behind the alias."""
    points: list[Point] = field(default_factory=list)
    ready_at_s: float | None = None
    requests: int = 0
    failed: int = 0
    inexact: int = 0
    errors: list[str] = field(default_factory=list)
    wave_models: dict[str, int] = field(default_factory=dict)
    """Failed answers of the newest wave on each exact release."""

    def count(self, counts: Counts) -> None:
        self.requests += counts.total
        self.failed += counts.failed
        self.inexact += counts.inexact
        self.errors.extend(counts.errors)

    def last(self, kind: str) -> Point | None:
        return next((point for point in reversed(self.points) if point.kind == kind), None)


class Story:
    """Drives the traffic; `run` once."""

    def __init__(self, system: System, started: float, say: Callable[[str], None]) -> None:
        """`started`: time.monotonic() that all times count from; `say` takes one line for the user."""
        self.system = system
        self.size: Size = system.size
        self.seed = system.seed
        self.started = started
        self.records = {plan.key: NodeRecord(plan) for plan in system.plans}
        self.snapshot: Snapshot | None = None
        self.phase = "starting"
        self.outcome = ""
        """Why the learning ended, in words."""
        self.learning_started_s: float | None = None
        self.settled_s: float | None = None
        self._say = say
        self._environments: dict[str, Environment] = {
            plan.key: CompanyApi(plan.key, seed=self.seed) for plan in system.plans
        }
        self._anchor: Environment = PublicTenants(seed=self.seed)
        self._enough = asyncio.Event()

    def now_s(self) -> float:
        return time.monotonic() - self.started

    async def run(self) -> None:
        """The whole story; raises ChildFailed when a process cannot be kept running."""
        async with self.system.operator() as operator:
            watching = asyncio.create_task(self._watch(operator))
            try:
                async with asyncio.TaskGroup() as group:
                    drives = [group.create_task(self._drive(record)) for record in self.records.values()]
                    group.create_task(self._decide())
                    group.create_task(self._guard(drives))
                self.phase = "settling"
                await self._settle()
                self.settled_s = self.now_s()
                self.phase = "measuring"
                await self._measure_end()
                self.snapshot = await operator.snapshot()
                self.phase = "done"
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)

    # One node.

    async def _drive(self, record: NodeRecord) -> None:
        key = record.plan.key
        await self.system.wait_ready(key)
        record.ready_at_s = self.now_s()
        self._say(f"node {key} is ready at {self.system.url(key)}")
        record.state = "measuring"
        await self._measure_own(record, "before")
        await self._measure_anchor(record, ALIAS)
        wave = 0
        last_release = ""
        while not self._enough.is_set():
            record.state = "idle"
            if not record.serving or record.serving == last_release:
                await asyncio.sleep(POLL_S)
                continue
            if self.learning_started_s is None:
                self.learning_started_s = self.now_s()
            last_release = record.serving
            if self.size.stop_at is None and _version(last_release) >= self.size.max_releases:
                break  # nothing more is to be learnt in this run
            count = self.size.first_wave if wave == 0 else self.size.next_wave
            record.state = f"wave of {count}"
            await self._wave(record, self._environments[key].tasks("train", count=count, seed=1000 * self.seed + wave))
            wave += 1
        record.state = "done"

    async def _wave(self, record: NodeRecord, tasks: Sequence[Task]) -> None:
        key = record.plan.key
        wave = await send_wave(self.system.url(key), ALIAS, self._environments[key], tasks, scale.WAVE_CONCURRENCY)
        record.count(wave)
        point = Point(self.now_s(), "wave", _label(wave), wave.passed, len(tasks))
        record.points.append(point)
        record.wave_models[point.release] = point.total - point.passed
        self._say(f"node {key} on {point.release}: {point.passed}/{point.total} of its own work is right")

    async def _measure_own(self, record: NodeRecord, kind: str) -> None:
        key = record.plan.key
        tasks = self._environments[key].tasks("held_out", count=self.size.measured_tasks, seed=self._measuring_seed)
        self._add(record, kind, await measure(self.system.url(key), ALIAS, self._environments[key], tasks))

    async def _measure_anchor(self, record: NodeRecord, model: str) -> None:
        tasks = self._anchor.tasks("held_out", count=self.size.measured_tasks, seed=self._measuring_seed)
        self._add(record, "anchor", await measure(self.system.url(record.plan.key), model, self._anchor, tasks))

    @property
    def _measuring_seed(self) -> int:
        """Apart from the seeds of the gate, so that what is reported is not what candidates were chosen by."""
        return 7_000_000 + self.seed

    def _add(self, record: NodeRecord, kind: str, measured: Measurement) -> None:
        record.count(measured)
        record.points.append(Point(self.now_s(), kind, _label(measured), measured.passed, measured.total))

    # All of them.

    async def _watch(self, operator: OperatorView) -> None:
        """Keep the snapshot of central and each node's serving label fresh."""
        async with httpx.AsyncClient(timeout=5) as client:
            while True:
                try:
                    self.snapshot = await operator.snapshot()
                except grpc.aio.AioRpcError:
                    pass  # central is away for a moment; the last snapshot stays
                for record in self.records.values():
                    if record.ready_at_s is not None:
                        await self._look_at(client, record)
                await asyncio.sleep(POLL_S)

    async def _look_at(self, client: httpx.AsyncClient, record: NodeRecord) -> None:
        label = await serving_label(client, self.system.url(record.plan.key))
        if label and label != record.serving:
            record.serving = label
            record.served.append((self.now_s(), label))
            self._say(f"node {record.plan.key} serves {ALIAS}@{label}")

    async def _guard(self, drives: Sequence[asyncio.Task[None]]) -> None:
        while not all(drive.done() for drive in drives):
            self.system.check()
            await asyncio.sleep(POLL_S)

    async def _decide(self) -> None:
        """Set `_enough` when the targets hold on the newest waves, or at a limit."""
        self.phase = "starting"
        while not self._enough.is_set():
            await asyncio.sleep(POLL_S)
            if self.learning_started_s is None or self.snapshot is None:
                continue
            self.phase = "learning"
            releases = len(self.snapshot.accepted("shared"))
            if self._targets_hold():
                self.outcome = "the targets hold on the newest waves"
            elif releases >= self.size.max_releases and (self._waves_on_heads() or self._all_driven()):
                self.outcome = f"{releases} releases of the shared cohort were made"
            elif self.now_s() - self.learning_started_s > self.size.learning_limit_s:
                self.outcome = f"{self.size.learning_limit_s:.0f} s of learning were over"
            else:
                continue
            self._say(f"learning ends: {self.outcome}")
            self._enough.set()

    def _all_driven(self) -> bool:
        return all(record.state == "done" for record in self.records.values())

    def _waves_on_heads(self) -> bool:
        """Whether every node has had a wave on the head of its cohort."""
        for record in self.records.values():
            head = self.snapshot.head(record.plan.cohort) if self.snapshot else None
            point = record.last("wave")
            if head is None or point is None or point.release != head.label:
                return False
        return True

    def _targets_hold(self) -> bool:
        if self.size.stop_at is None or not self._waves_on_heads():
            return False
        rates: dict[str, float] = {
            key: point.percent for key, record in self.records.items() if (point := record.last("wave"))
        }
        return self.size.stop_at.holds(rates)

    def expects_update(self, record: NodeRecord) -> bool:
        """Whether the node has seen enough failures of its release to be training, and its update is not here yet."""
        if (
            not record.plan.learns
            or self.snapshot is None
            or record.wave_models.get(record.serving, -1) < scale.min_failures(record.plan.cohort)
        ):
            return False
        node = self.snapshot.nodes.get(record.plan.name)
        release = next((r for r in self.snapshot.releases if r.label == record.serving), None)
        return not any(
            node and release and update.node_id == node.node_id and update.start_release_id == release.release_id
            for update in self.snapshot.updates
        )

    def on_its_way(self) -> list[str]:
        """What still moves, in words; empty when the system is at rest."""
        if self.snapshot is None:
            return ["central has not been seen"]
        counts = self.snapshot.update_counts()
        moving = [f"{counts[state]} updates {state}" for state in ("waiting", "planned") if counts[state]]
        moving += [f"node {key} trains" for key, record in self.records.items() if self.expects_update(record)]
        for key, record in self.records.items():
            head = self.snapshot.head(record.plan.cohort)
            if head is not None and record.serving != head.label:
                moving.append(f"node {key} does not serve {head.label} yet")
        return moving

    async def _settle(self) -> None:
        """Wait until the system rests; what is still moving at the limit is said, and measured as it is."""
        limit_s = self.now_s() + self.size.settle_limit_s
        rested = 0
        while rested < 4:
            self.system.check()
            moving = self.on_its_way()
            rested = 0 if moving else rested + 1
            if self.now_s() > limit_s:
                self.outcome += "; still on its way at the end: " + ", ".join(moving)
                self._say(f"not at rest after {self.size.settle_limit_s:.0f} s: {', '.join(moving)}")
                return
            await asyncio.sleep(POLL_S)

    async def _measure_end(self) -> None:
        async def one(record: NodeRecord) -> None:
            record.state = "measuring"
            await self._measure_own(record, "after")
            for _, label in record.served[1:]:
                await self._measure_anchor(record, f"{ALIAS}@{label}")
            record.state = "done"

        async with asyncio.TaskGroup() as group:
            for record in self.records.values():
                group.create_task(one(record))


async def serving_label(client: httpx.AsyncClient, url: str) -> str:
    """Label of the release behind the alias, from GET /v1/models; empty while the node does not say."""
    try:
        models = (await client.get(f"{url}/v1/models")).json()["data"]
    except (httpx.HTTPError, ValueError, KeyError):
        return ""
    for model in models:
        if model["id"] == ALIAS:
            return str(model.get("root") or "").partition("@")[2]
    return ""


def _version(label: str) -> int:
    return int(label.removeprefix("v").partition("-")[0])


def _label(counts: Counts) -> str:
    """The release that gave most of the answers."""
    if not counts.models:
        return ""
    return max(counts.models, key=lambda name: counts.models[name]).partition("@")[2]
