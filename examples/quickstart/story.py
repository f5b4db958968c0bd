"""The quickstart's story: who asks what of which node, when it is enough, and what came of it.

In: a running System. Out: a record for each node and the newest snapshot of central. Guarantees:
nodes are reached through their public endpoints only; only requests and feedback drive learning.
The story ends when the targets hold and nothing is on its way, or at a limit, and says which.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import httpx

from edge_node.environments import Environment, TextEnvironment
from edge_node.environments.loader import load_environment
from edge_node.settings import EnvironmentSpec
from examples.quickstart.operator_view import OperatorView, Snapshot
from examples.quickstart.system import ALIAS, System
from examples.quickstart.traffic import (
    Counts,
    Measurement,
    ask_wave,
    give_feedback,
    measure,
    measure_texts,
)
from examples.quickstart.world import NodePlan, Size

POLL_S = 0.5
STANDSTILL_S = 15.0


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
    taught: dict[str, int] = field(default_factory=dict)
    """How often the node was told of enough failures of each release to start a round."""

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
        """`started`: time.monotonic() where all times begin; `say` takes a line for the user."""
        self.system = system
        self.world = system.world
        self.size: Size = system.size
        self.seed = system.seed
        self.started = started
        self.records = {plan.key: NodeRecord(plan) for plan in system.plans}
        self.snapshot: Snapshot | None = None
        self.phase = "starting"
        self.outcome: dict[str, str] = {}
        """Why each cohort stopped learning, in words."""
        self.text_logprob: dict[str, float] = {}
        """Nats a token of the world's texts under each release that was served, oldest first."""
        self.learning_started_s: float | None = None
        self.settled_s: float | None = None
        self._say = say
        self._environments: dict[str, Environment] = {
            plan.key: _with_tasks(self.world.own(plan, self.seed)) for plan in system.plans
        }
        self._anchor = _with_tasks(self.world.anchor(self.seed))
        texts = None if self.world.texts is None else load_environment(self.world.texts)
        self._texts = texts if isinstance(texts, TextEnvironment) else None
        self._enough = {plan.cohort: asyncio.Event() for plan in system.plans}

    def now_s(self) -> float:
        return time.monotonic() - self.started

    async def run(self) -> None:
        """The whole story; raises ChildFailed when a process cannot be kept running."""
        async with self.system.operator() as operator:
            watching = asyncio.create_task(self._watch(operator))
            try:
                async with asyncio.TaskGroup() as group:
                    drives = [
                        group.create_task(self._drive(record)) for record in self.records.values()
                    ]
                    group.create_task(self._guard(drives))
                self.phase = "coming to rest"
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
        cohort, number = record.plan.cohort, 0
        while not self._enough[cohort].is_set():
            record.state = "idle"
            if not record.serving or not self._is_due(record):
                await asyncio.sleep(POLL_S)
            elif self.size.stop_at is None and _version(record.serving) >= self.size.max_releases:
                self._finish(cohort, f"{self.size.max_releases} releases were made")
            else:
                await self._wave(record, number)
                number += 1
            if (
                self.now_s() - (self.learning_started_s or self.now_s())
                > self.size.learning_limit_s
            ):
                self._finish(cohort, f"{self.size.learning_limit_s:.0f} s of learning were over")
        record.state = "done"

    def _is_due(self, record: NodeRecord) -> bool:
        """Whether the node has had no wave on what it serves, or its cohort stands still.

        A rejected candidate, for example, leaves the release as it is; then another wave is needed.
        """
        point = record.last("wave")
        if point is None or point.release != record.serving:
            return True
        return self.now_s() - point.at_s > STANDSTILL_S and not self.on_its_way(record.plan.cohort)

    async def _wave(self, record: NodeRecord, number: int) -> None:
        """Ask, and say what was wrong unless the cohort is good enough.

        Without feedback a node has nothing to learn.
        """
        key, url = record.plan.key, self.system.url(record.plan.key)
        count = self.size.next_wave if number else self.size.first_wave
        record.state = f"asks {count}"
        tasks = self._environments[key].tasks("train", count=count, seed=1000 * self.seed + number)
        wave = await ask_wave(url, ALIAS, self._environments[key], tasks, self.world.asking)
        point = Point(self.now_s(), "wave", _label(wave), wave.passed, len(tasks))
        record.points.append(point)
        self._say(
            f"node {key} on {point.release}: {point.passed}/{point.total} of its own work is right"
        )
        record.state = "compares"
        if number == 0 or not await self._is_enough(record, point.release):
            record.state = "gives feedback"
            enough = point.total - point.passed >= self.world.min_failures(record.plan.cohort)
            record.taught[point.release] = record.taught.get(point.release, 0) + enough
            await give_feedback(url, wave, self.world.asking)
        record.count(wave)

    async def _measure_own(self, record: NodeRecord, kind: str) -> None:
        key = record.plan.key
        tasks = self._environments[key].tasks(
            "held_out", count=self.size.measured_tasks, seed=self._measuring_seed
        )
        self._add(
            record,
            kind,
            await measure(
                self.system.url(key), ALIAS, self._environments[key], tasks, self.world.asking
            ),
        )

    async def _measure_anchor(self, record: NodeRecord, model: str) -> None:
        tasks = self._anchor.tasks(
            "held_out", count=self.size.measured_tasks, seed=self._measuring_seed
        )
        self._add(
            record,
            "anchor",
            await measure(
                self.system.url(record.plan.key), model, self._anchor, tasks, self.world.asking
            ),
        )

    @property
    def _measuring_seed(self) -> int:
        """Another seed than the gate's: what is reported must not be what chose the candidates."""
        return 7_000_000 + self.seed

    def _add(self, record: NodeRecord, kind: str, measured: Measurement) -> None:
        record.count(measured)
        record.points.append(
            Point(self.now_s(), kind, _label(measured), measured.passed, measured.total)
        )

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

    async def _is_enough(self, record: NodeRecord, release: str) -> bool:
        """Whether the record's cohort meets its targets on `release`.

        Waits a little for the others' waves on it.
        """
        cohort = record.plan.cohort
        others = [other for other in self.records.values() if other.plan.cohort == cohort]
        limit_s = self.now_s() + self.world.peers_limit_s
        while self.now_s() < limit_s and not self._enough[cohort].is_set():
            points = {other.plan.key: other.last("wave") for other in others}
            rates: dict[str, float] = {
                k: p.percent for k, p in points.items() if p and p.release == release
            }
            if len(rates) == len(others):
                self._decide(cohort, release, rates)
                break
            await asyncio.sleep(POLL_S / 5)
        return self._enough[cohort].is_set()

    def _decide(self, cohort: str, release: str, rates: Mapping[str, float]) -> None:
        if self.size.is_enough(rates, self.now_s() - (self.learning_started_s or self.now_s())):
            reason = f"the targets hold on {release}"
        elif _version(release) >= self.size.max_releases:
            reason = f"{self.size.max_releases} releases were made"
        else:
            return
        self._finish(cohort, reason)

    def _finish(self, cohort: str, reason: str) -> None:
        if not self._enough[cohort].is_set():
            self.outcome[cohort] = reason
            self._say(f"cohort {cohort} stops learning: {reason}")
            self._enough[cohort].set()

    def expects_update(self, record: NodeRecord) -> bool:
        """Whether the node was taught enough to be training, and its update is not here yet."""
        if not record.plan.learns or self.snapshot is None:
            return False
        node = self.snapshot.nodes.get(record.plan.name)
        release = next((r for r in self.snapshot.releases if r.label == record.serving), None)
        here = sum(
            node is not None and release is not None
            and update.node_id == node.node_id and update.start_release_id == release.release_id
            for update in self.snapshot.updates
        )  # fmt: skip
        return record.taught.get(record.serving, 0) > here

    def on_its_way(self, cohort: str | None = None) -> list[str]:
        """What still moves (in `cohort`), in words; empty when it is at rest."""
        if self.snapshot is None:
            return ["central has not been seen"]
        counts = self.snapshot.update_counts(cohort)
        records = {
            key: record
            for key, record in self.records.items()
            if cohort in (None, record.plan.cohort)
        }
        moving = [
            f"{counts[state]} updates {state}" for state in ("waiting", "planned") if counts[state]
        ]
        moving += [
            f"node {key} trains" for key, record in records.items() if self.expects_update(record)
        ]
        for key, record in records.items():
            head = self.snapshot.head(record.plan.cohort)
            if head is not None and record.serving != head.label:
                moving.append(f"node {key} does not serve {head.label} yet")
        return moving

    async def _settle(self) -> None:
        """Wait until the system rests.

        At the limit, say what still moves and measure as it is.
        """
        limit_s = self.now_s() + self.size.settle_limit_s
        rested = 0
        while rested < 4:
            self.system.check()
            moving = self.on_its_way()
            rested = 0 if moving else rested + 1
            if self.now_s() > limit_s:
                self.outcome["still on its way"] = ", ".join(moving)
                self._say(
                    f"not at rest after {self.size.settle_limit_s:.0f} s: {', '.join(moving)}"
                )
                return
            await asyncio.sleep(POLL_S)

    async def _measure_end(self) -> None:
        async def one(record: NodeRecord) -> None:
            record.state = "measuring"
            await self._measure_own(record, "after")
            for _, label in record.served[1:]:
                await self._measure_anchor(record, f"{ALIAS}@{label}")
            if record.plan is self.system.plans[-1]:
                await self._measure_texts(record)
            record.state = "done"

        async with asyncio.TaskGroup() as group:
            for record in self.records.values():
                group.create_task(one(record))

    async def _measure_texts(self, record: NodeRecord) -> None:
        """Each release that `record` served, oldest first."""
        if self._texts is None:
            return
        documents = self._texts.documents(
            "held_out", count=self.size.measured_tasks, seed=self._measuring_seed
        )
        for _, label in record.served:
            measured = await measure_texts(
                self.system.url(record.plan.key), f"{ALIAS}@{label}", documents, self.world.asking
            )
            record.count(measured)
            self.text_logprob[label] = measured.mean


async def serving_label(client: httpx.AsyncClient, url: str) -> str:
    """Label of the release behind the alias, from GET /v1/models; empty without one."""
    try:
        models = (await client.get(f"{url}/v1/models")).json()["data"]
    except (httpx.HTTPError, ValueError, KeyError):
        return ""
    for model in models:
        if model["id"] == ALIAS:
            return str(model.get("root") or "").partition("@")[2]
    return ""


def _with_tasks(spec: EnvironmentSpec) -> Environment:
    environment = load_environment(spec)
    assert isinstance(environment, Environment)
    return environment


def _version(label: str) -> int:
    return int(label.removeprefix("v").partition("-")[0])


def _label(counts: Counts) -> str:
    """The release that gave most of the answers."""
    if not counts.models:
        return ""
    return max(counts.models, key=lambda name: counts.models[name]).partition("@")[2]
