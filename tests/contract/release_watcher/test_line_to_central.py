"""What node and central tell each other, and the problems of the line between them."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import ServingError
from edge_node.problems import Problems
from edge_node.releases.store import ReleaseStore
from edge_node.settings import CentralSettings, ReleasesSettings
from protos.fleet.v1 import fleet_pb2
from tests.contract.release_watcher.stand_ins import (
    Central,
    Connect,
    Control,
    Vllm,
    head_event,
    trouble,
    until,
    watching,
)
from tests.fakes.signed_releases import make_payload, make_signed


async def test_central_hears_the_channel_and_what_is_wrong_with_its_release(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    canary = fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel="canary", head=signed))
    central = Central(payload, [canary], cuts=0)
    statuses: list[fleet_pb2.NodeStatus] = []

    async def report(
        request: fleet_pb2.ReportStatusRequest, context: object
    ) -> fleet_pb2.ReportStatusResponse:
        statuses.append(request.status)
        return fleet_pb2.ReportStatusResponse()

    broken = [True]

    class Refusing(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            if broken:
                raise ServingError("vLLM refused the adapter")
            await super().load(name, path)

    monkeypatch.setattr(central, "ReportStatus", report)
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.02)
    async with watching(
        store, await connect(central), Refusing(), releases=ReleasesSettings(channel="canary")
    ):
        await until(
            lambda: bool(statuses) and statuses[-1].release_problem == "vLLM refused the adapter"
        )
        assert statuses[-1].channel == "canary"
        broken.clear()
        served = store.check(signed).digest
        await until(
            lambda: (statuses[-1].release_problem, statuses[-1].serving_release_id) == ("", served)
        )
        monkeypatch.setattr(Vllm, "generation", 2)
        monkeypatch.setattr(Vllm, "wait_ready", lambda self: asyncio.Event().wait())
        await until(lambda: "started anew" in statuses[-1].release_problem)


async def test_old_news_of_a_former_process_is_no_trouble_of_a_canary(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload = make_payload()
    central = Central(payload, [head_event(make_signed(key, payload))], cuts=0)
    statuses: list[fleet_pb2.NodeStatus] = []

    async def report(
        request: fleet_pb2.ReportStatusRequest, context: object
    ) -> fleet_pb2.ReportStatusResponse:
        statuses.append(request.status)
        return fleet_pb2.ReportStatusResponse()

    waits = asyncio.Event()

    class Slow(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            await waits.wait()
            await super().load(name, path)

    monkeypatch.setattr(central, "ReportStatus", report)
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    Problems(store.partial("x").parents[2]).report(
        "releases", "It was refused, yesterday.", "Look."
    )
    async with watching(store, await connect(central), Slow()):
        await until(lambda: bool(statuses))
        assert statuses[0].release_problem == ""
        [told] = [problem for problem in statuses[0].problems if problem.room == "releases"]
        assert (told.text, told.next_step) == ("It was refused, yesterday.", "Look.")
        assert told.since
        waits.set()
        await until(lambda: not statuses[-1].problems)


async def test_a_central_that_is_away_or_silent_or_hangs_up_is_a_problem_until_it_is_heard(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.RETRY_LAST_S", 0.02)
    central = Central(make_payload())
    ways: list[str] = ["aborts", "hangs up", "is silent"]

    async def watch(request: object, context: Any) -> AsyncIterator[fleet_pb2.WatchResponse]:
        way = ways[0] if ways else "beats"
        if way == "aborts":
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "node n-1 is revoked")
        if way == "is silent":
            await asyncio.Event().wait()
        while way == "beats":
            yield fleet_pb2.WatchResponse(heartbeat=fleet_pb2.Heartbeat())
            await asyncio.sleep(0.02)

    monkeypatch.setattr(central, "Watch", watch)
    settings = {"central": CentralSettings(call_timeout_s=0.3)}
    async with watching(store, await connect(central), Control(), **settings):
        for text in (
            "node n-1 is revoked",
            "ended the connection without a word",
            "silent for 0.3 s",
        ):
            await until(
                lambda text=text: (
                    "central" in trouble(store) and text in trouble(store)["central"].text
                )
            )
            if ways[0] == "aborts":
                assert "central nodes" in trouble(store)["central"].next_step
            else:
                assert "EDGE_CENTRAL__ADDRESS" in trouble(store)["central"].next_step
            ways.pop(0)
        await until(lambda: not trouble(store))


async def test_news_that_cannot_be_kept_is_a_problem_until_all_of_it_is(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head is kept each time, the offer after it is not: one lasting problem, not many."""
    monkeypatch.setattr("edge_node.releases.watcher.RETRY_LAST_S", 0.02)
    payload = make_payload()
    train = fleet_pb2.WatchResponse(train=fleet_pb2.TrainOffer(offer_id="t1", max_rank=4))
    beat = fleet_pb2.WatchResponse(heartbeat=fleet_pb2.Heartbeat())
    central = Central(payload, [head_event(make_signed(key, payload)), train, beat], cuts=0)
    full = [OSError(errno.ENOSPC, "No space left on device")]

    def keep(*_: object) -> None:
        if full:
            raise full[0]

    monkeypatch.setattr(store, "keep_offer", keep)
    async with watching(store, await connect(central), Control()):
        await until(lambda: "central-news" in trouble(store))
        assert "No space left on device" in trouble(store)["central-news"].text
        await until(lambda: central.watches > 2)
        assert "central-news" in trouble(store)
        full.clear()
        await until(lambda: not trouble(store))


async def test_a_quarantine_is_a_problem_until_central_releases_the_node(
    store: ReleaseStore, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    standings = ["odd labels"]
    central = Central(make_payload())

    async def watch(request: object, context: object) -> AsyncIterator[fleet_pb2.WatchResponse]:
        for _ in range(1000):
            standing = fleet_pb2.NodeStanding(quarantine="".join(standings))
            yield fleet_pb2.WatchResponse(standing=standing)
            await asyncio.sleep(0.02)

    monkeypatch.setattr(central, "Watch", watch)
    async with watching(store, await connect(central), Control()):
        await until(lambda: "quarantine" in trouble(store))
        assert "odd labels" in trouble(store)["quarantine"].text
        assert "central nodes release" in trouble(store)["quarantine"].next_step
        standings.clear()
        await until(lambda: not trouble(store))


async def test_a_status_that_cannot_be_told_is_a_problem_until_it_can(
    store: ReleaseStore, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    central, broken = Central(make_payload()), [True]

    async def report(request: object, context: Any) -> fleet_pb2.ReportStatusResponse:
        if broken:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        return fleet_pb2.ReportStatusResponse()

    monkeypatch.setattr(central, "ReportStatus", report)
    async with watching(store, await connect(central), Control()):
        await until(lambda: "status" in trouble(store))
        assert "RESOURCE_EXHAUSTED: too much" in trouble(store)["status"].text
        broken.clear()
        await until(lambda: "status" not in trouble(store))
