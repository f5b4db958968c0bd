"""The node's side of fleet and releases against a real grpc.aio server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import errno
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.errors import AdapterError, ServingError, StorageError
from edge_node.identity import Identity
from edge_node.problems import Problem, Problems
from edge_node.releases.download import fetch_release
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.store import ReleaseStore
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.settings import CentralSettings, EdgeSettings, EnvironmentSpec, ReleasesSettings, ServingSettings
from protos.base import BaseModelInfo
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.releases.v1 import releases_pb2, releases_pb2_grpc
from tests.fakes.endpoint import at
from tests.unit.edge_node.releases.test_release_store import BASE, SHAPES, make_payload, make_signed


@dataclass
class Central(releases_pb2_grpc.ReleaseServiceServicer, fleet_pb2_grpc.FleetServiceServicer):
    """Plays the events it is told to, cuts the first download in the middle, and remembers what it was asked."""

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

    async def load(self, name: str, path: Path) -> None:
        assert (path / "adapter_config.json").is_file()
        self.calls.append(("load", name))

    async def point(self, name: str) -> None:
        self.calls.append(("point", name))

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))


class Vllm:
    generation = 1

    async def wait_ready(self) -> int:
        return self.generation


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def store(tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> ReleaseStore:
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return ReleaseStore(
        tmp_path, Identity("n-1", "shared", BASE, key, b"", b"", public), BaseModelInfo(tmp_path, BASE, SHAPES)
    )


Connect = Callable[[Central], Awaitable[grpc.aio.Channel]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    opened: list[grpc.aio.Server | grpc.aio.Channel] = []

    async def start(central: Central) -> grpc.aio.Channel:
        server = grpc.aio.server()
        releases_pb2_grpc.add_ReleaseServiceServicer_to_server(central, server)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(central, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        opened.extend([server, channel])
        return channel

    yield start
    for item in reversed(opened):
        await (item.close() if isinstance(item, grpc.aio.Channel) else item.stop(0))


async def test_a_cut_download_goes_on_where_it_was(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    central = Central(payload)
    channel, signed = await connect(central), make_signed(key, payload)
    with pytest.raises(grpc.aio.AioRpcError):
        await fetch_release(channel, store, signed, timeout_s=5)
    release = await fetch_release(channel, store, signed, timeout_s=5)
    assert central.offsets == [0, 100]
    assert (release.path / "payload.safetensors").read_bytes() == payload
    await fetch_release(channel, store, signed, timeout_s=5)
    assert len(central.offsets) == 2, "what is on disk is not downloaded again"


async def test_a_wrong_payload_is_fetched_once_more_and_then_refused(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    central = Central(bytes(len(payload)), cuts=0)
    with pytest.raises(AdapterError, match="has digest"):
        await fetch_release(await connect(central), store, make_signed(key, payload), timeout_s=5)
    assert central.offsets == [0, 0]
    assert store.newest() == []


async def test_the_alias_follows_the_head_and_an_offer_is_answered_once(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    other_cohort = make_signed(key, payload, cohort="zeta")
    offer = fleet_pb2.EvaluationOffer(offer_id="o1", candidate=signed, reference=signed, tasks=3, deadline_s=20)
    central = Central(
        payload,
        [
            fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel="canary", head=other_cohort)),
            fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel="stable", head=signed)),
            fleet_pb2.WatchResponse(standing=fleet_pb2.NodeStanding(quarantine="odd labels")),
            fleet_pb2.WatchResponse(train=fleet_pb2.TrainOffer(offer_id="t1", max_rank=4)),
            fleet_pb2.WatchResponse(evaluation=offer),
        ],
    )
    control = Control()
    watcher = ReleaseWatcher(
        EdgeSettings(data_dir=tmp_path),
        await connect(central),
        store,
        Vllm(),
        control,  # type: ignore[arg-type]
        Evaluator(at("http://127.0.0.1:9"), {}),
        fleet_pb2.NodeStatus,
        tuple,
    )
    task = asyncio.create_task(watcher.run())
    name = f"lorikeet@{store.check(signed).label}"
    async with asyncio.timeout(20):
        while ("point", name) not in control.calls or not central.reports or central.watches < 2:
            await asyncio.sleep(0.02)
    task.cancel()
    active = store.active()
    assert active is not None
    assert active.release_id == store.check(signed).digest
    assert control.calls.index(("load", name)) < control.calls.index(("point", name))
    assert [report.offer_id for report in central.reports] == ["o1"]
    assert (tmp_path / "releases" / "offer.json").is_file()
    assert store.quarantine() == "odd labels"
    assert not any("zeta" in name for _, name in control.calls)


def head_event(signed: releases_pb2.SignedManifest) -> fleet_pb2.WatchResponse:
    return fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel="stable", head=signed))


def evaluation_event(signed: releases_pb2.SignedManifest, reference: releases_pb2.SignedManifest) -> Any:
    offer = fleet_pb2.EvaluationOffer(offer_id="o1", candidate=signed, reference=reference, tasks=3, deadline_s=20)
    return fleet_pb2.WatchResponse(evaluation=offer)


async def test_of_the_offers_that_wait_only_the_newest_is_evaluated(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    """Central goes on without a node that is slow: what it asked meanwhile, it does not wait for any more."""
    payload = make_payload()
    signed = make_signed(key, payload)
    events = [head_event(signed)]
    for number in range(4):
        event = evaluation_event(signed, signed)
        event.evaluation.offer_id = f"o{number}"
        events.append(event)
    central, heard = Central(payload, events, cuts=0), asyncio.Event()

    class Slow(Control):
        async def load(self, name: str, path: Path) -> None:
            await heard.wait()
            await super().load(name, path)

    async with watching(store, await connect(central), Slow()):
        await until(lambda: central.watches == 2)  # the first one brought everything
        heard.set()
        await until(lambda: bool(central.reports) and central.reports[-1].offer_id == "o3")
    assert [report.offer_id for report in central.reports] == ["o0", "o3"]


class Broken:
    """An environment whose tasks quote what no log and no central may see."""

    def tasks(self, split: str, *, count: int, seed: int) -> list[Any]:
        raise RuntimeError("the secret recipe of a customer")


class Idle:
    """An environment without tasks: candidate and reference are loaded, and nothing is asked."""

    def tasks(self, split: str, *, count: int, seed: int) -> list[Any]:
        return []


IDLE = {"idle": (EnvironmentSpec(name="idle", factory="x:Y"), Idle())}


@asynccontextmanager
async def watching(
    store: ReleaseStore,
    channel: grpc.aio.Channel,
    control: Control,
    environments: Any = IDLE,
    evaluation_url: str = "http://127.0.0.1:9",
    **settings: Any,
) -> AsyncIterator[asyncio.Task[None]]:
    watcher = ReleaseWatcher(
        EdgeSettings(data_dir=store.partial("x").parents[2], **settings),
        channel,
        store,
        Vllm(),
        control,  # type: ignore[arg-type]
        Evaluator(at(evaluation_url), dict(environments)),
        fleet_pb2.NodeStatus,
        tuple,
    )
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


async def test_a_broken_environment_abstains_without_its_words(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [head_event(signed), evaluation_event(signed, signed)], cuts=0)
    broken = {"acme": (EnvironmentSpec(name="acme", factory="x:Y"), Broken())}
    async with watching(store, await connect(central), Control(), broken):
        await until(lambda: bool(central.reports))
    assert re.fullmatch(
        r"Environment 'acme' raised RuntimeError in tasks \(test_release_watcher.py:\d+\); expected it to raise nothing.",
        central.reports[0].abstain_reason,
    )
    assert "secret recipe" not in caplog.text + repr([vars(record) for record in caplog.records])


async def test_trouble_of_the_disk_does_not_end_the_watcher(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    train = fleet_pb2.WatchResponse(train=fleet_pb2.TrainOffer(offer_id="t1", max_rank=4))
    central = Central(payload, [train, head_event(signed)], cuts=0)
    full = OSError(errno.ENOSPC, "No space left on device")
    real, failures = store.install, [full, StorageError("no space"), sqlite3.OperationalError("disk I/O error")]

    def install(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments)

    offers = [full]
    monkeypatch.setattr(store, "install", install)
    monkeypatch.setattr(store, "keep_offer", lambda *_: offers and (_ for _ in ()).throw(offers.pop()))
    control = Control()
    async with watching(store, await connect(central), control):
        await until(lambda: ("point", f"lorikeet@{store.check(signed).label}") in control.calls)
    assert not failures
    assert not offers


async def test_a_release_that_was_named_but_not_pointed_at_is_pointed_at_later(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    control, real = Control(), Control.point
    failures = [ServingError("vLLM's control socket did not answer")]

    async def point(name: str) -> None:
        if failures:
            raise failures.pop()
        await real(control, name)

    monkeypatch.setattr(control, "point", point)
    async with watching(store, await connect(Central(payload, [head_event(signed)], cuts=0)), control):
        await until(lambda: ("point", f"lorikeet@{store.check(signed).label}") in control.calls)
    assert not failures


async def test_a_release_of_too_high_a_rank_is_named_and_not_downloaded(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    central = Central(make_payload(), [head_event(make_signed(key, make_payload(), rank=9))])
    async with watching(store, await connect(central), Control(), serving=ServingSettings(max_lora_rank=8)):
        await until(lambda: any("EDGE_SERVING__MAX_LORA_RANK" in repr(vars(record)) for record in caplog.records))
    assert central.offsets == []


async def test_a_release_that_head_and_evaluation_want_at_once_is_downloaded_once(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [evaluation_event(signed, signed), head_event(signed)], cuts=0)
    control = Control()
    async with watching(store, await connect(central), control):
        await until(lambda: bool(central.reports) and any(call == "point" for call, _ in control.calls))
    assert central.offsets == [0]
    assert not central.reports[0].abstain_reason


async def test_rejected_candidates_do_not_pile_up(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    active, *others = [make_signed(key, payload, version=number) for number in range(1, 5)]
    store.activate(store.install(active, payload))
    for signed in others:
        store.install(signed, payload)
    central = Central(payload, [head_event(active), evaluation_event(others[-1], active)], cuts=0)
    control = Control()
    async with watching(store, await connect(central), control, releases=ReleasesSettings(keep=2)):
        await until(lambda: len(store.newest()) == 3)
    assert {release.manifest.version for release in store.newest()} == {1, 3, 4}, "the active one and the newest two"
    assert ("unload", f"lorikeet@{store.check(others[0]).label}") in control.calls


async def test_central_hears_the_channel_and_what_is_wrong_with_its_release(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    canary = fleet_pb2.WatchResponse(head=fleet_pb2.ChannelHead(channel="canary", head=signed))
    central = Central(payload, [canary], cuts=0)
    statuses: list[fleet_pb2.NodeStatus] = []

    async def report(request: fleet_pb2.ReportStatusRequest, context: object) -> fleet_pb2.ReportStatusResponse:
        statuses.append(request.status)
        return fleet_pb2.ReportStatusResponse()

    broken = [True]

    class Refusing(Control):
        async def load(self, name: str, path: Path) -> None:
            if broken:
                raise ServingError("vLLM refused the adapter")
            await super().load(name, path)

    monkeypatch.setattr(central, "ReportStatus", report)
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.02)
    async with watching(store, await connect(central), Refusing(), releases=ReleasesSettings(channel="canary")):
        await until(lambda: bool(statuses) and statuses[-1].release_problem == "vLLM refused the adapter")
        assert statuses[-1].channel == "canary"
        broken.clear()
        served = store.check(signed).digest
        await until(lambda: (statuses[-1].release_problem, statuses[-1].serving_release_id) == ("", served))
        monkeypatch.setattr(Vllm, "generation", 2)
        monkeypatch.setattr(Vllm, "wait_ready", lambda self: asyncio.Event().wait())
        await until(lambda: "started anew" in statuses[-1].release_problem)


async def test_a_release_that_cannot_be_served_is_a_problem_until_it_is(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.02)
    payload = make_payload()
    broken = [True]

    class Refusing(Control):
        async def load(self, name: str, path: Path) -> None:
            if broken:
                raise ServingError("vLLM refused the adapter")
            await super().load(name, path)

    central = Central(payload, [head_event(make_signed(key, payload))], cuts=0)
    async with watching(store, await connect(central), Refusing()):
        await until(lambda: "releases" in trouble(store))
        problem = trouble(store)["releases"]
        assert problem.text == "The release of channel 'stable' is not served: vLLM refused the adapter"
        assert "logs/vllm.log" in problem.next_step
        broken.clear()
        await until(lambda: not trouble(store))


async def test_old_news_of_a_former_process_is_no_trouble_of_a_canary(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    central = Central(payload, [head_event(make_signed(key, payload))], cuts=0)
    statuses: list[fleet_pb2.NodeStatus] = []

    async def report(request: fleet_pb2.ReportStatusRequest, context: object) -> fleet_pb2.ReportStatusResponse:
        statuses.append(request.status)
        return fleet_pb2.ReportStatusResponse()

    waits = asyncio.Event()

    class Slow(Control):
        async def load(self, name: str, path: Path) -> None:
            await waits.wait()
            await super().load(name, path)

    monkeypatch.setattr(central, "ReportStatus", report)
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    Problems(store.partial("x").parents[2]).report("releases", "It was refused, yesterday.", "Look.")
    async with watching(store, await connect(central), Slow()):
        await until(lambda: bool(statuses))
        assert statuses[0].release_problem == ""
        [told] = [problem for problem in statuses[0].problems if problem.room == "releases"]
        assert (told.text, told.next_step) == ("It was refused, yesterday.", "Look.")
        assert told.since
        waits.set()
        await until(lambda: not statuses[-1].problems)


async def test_a_central_that_is_away_or_silent_or_hangs_up_is_a_problem_until_it_is_heard(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
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
        for text in ("node n-1 is revoked", "ended the connection without a word", "silent for 0.3 s"):
            await until(lambda text=text: "central" in trouble(store) and text in trouble(store)["central"].text)
            if ways[0] == "aborts":
                assert "central nodes" in trouble(store)["central"].next_step
            else:
                assert "EDGE_CENTRAL__ADDRESS" in trouble(store)["central"].next_step
            ways.pop(0)
        await until(lambda: not trouble(store))


async def test_news_that_cannot_be_kept_is_a_problem_until_all_of_it_is(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is kept each time, and the offer after it is not: that is one lasting problem, not many short ones."""
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


class Moody(Idle):
    """Broken until told otherwise."""

    broken = True

    def tasks(self, split: str, *, count: int, seed: int) -> list[Any]:
        if self.broken:
            raise KeyError("the secret recipe of a customer")
        return []


async def test_an_environment_that_raises_is_a_problem_until_an_evaluation_succeeds(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    signed, environment = make_signed(key, payload), Moody()
    again = asyncio.Event()
    central = Central(payload)

    async def watch(request: object, context: object) -> AsyncIterator[fleet_pb2.WatchResponse]:
        yield evaluation_event(signed, signed)
        await again.wait()
        event = evaluation_event(signed, signed)
        event.evaluation.offer_id = "o2"
        yield event
        await asyncio.Event().wait()

    monkeypatch.setattr(central, "Watch", watch)
    central.cuts = 0
    moody = {"acme": (EnvironmentSpec(name="acme", factory="x:Y"), environment)}
    async with watching(store, await connect(central), Control(), moody):
        await until(lambda: "environments" in trouble(store))
        problem = trouble(store)["environments"]
        assert "Environment 'acme' raised KeyError in tasks" in problem.text
        assert "secret" not in problem.text
        assert "EDGE_ENVIRONMENTS" in problem.next_step
        environment.broken = False
        again.set()
        await until(lambda: not trouble(store))


async def test_an_evaluation_that_takes_too_long_is_a_problem_with_the_time_it_had(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    class Hanging(Control):
        async def load(self, name: str, path: Path) -> None:
            await asyncio.Event().wait()

    payload = make_payload()
    event = evaluation_event(make_signed(key, payload), make_signed(key, payload))
    event.evaluation.deadline_s = 1
    central = Central(payload, [event], cuts=0)
    async with watching(store, await connect(central), Hanging()):
        await until(lambda: "evaluation" in trouble(store))
    assert "it took longer than the 1 s that central waits" in trouble(store)["evaluation"].text


async def test_a_node_without_environments_abstains_and_has_no_trouble(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [evaluation_event(signed, signed)], cuts=0)
    async with watching(store, await connect(central), Control(), {}):
        await until(lambda: bool(central.reports))
    assert "no environment" in central.reports[0].abstain_reason
    assert trouble(store) == {}


@pytest.mark.parametrize(
    ("code", "stays"), [(grpc.StatusCode.INVALID_ARGUMENT, True), (grpc.StatusCode.FAILED_PRECONDITION, False)]
)
async def test_a_result_that_central_refuses_is_a_problem_one_that_comes_late_is_none(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    code: grpc.StatusCode,
    stays: bool,
) -> None:
    payload = make_payload()
    signed, asked = make_signed(key, payload), asyncio.Event()
    central = Central(payload, [evaluation_event(signed, signed)], cuts=0)

    async def refuse(request: object, context: Any) -> None:
        asked.set()
        await context.abort(code, "no thanks")

    monkeypatch.setattr(central, "ReportEvaluation", refuse)
    async with watching(store, await connect(central), Control()):
        await asked.wait()
        if stays:
            await until(lambda: "evaluation" in trouble(store))
            assert "no thanks" in trouble(store)["evaluation"].text
        await asyncio.sleep(0.1)
        assert ("evaluation" in trouble(store)) == stays


async def test_old_releases_that_cannot_be_removed_are_a_problem_until_they_are(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    active, *others = [make_signed(key, payload, version=number) for number in range(1, 5)]
    store.activate(store.install(active, payload))
    for signed in others:
        store.install(signed, payload)
    real, broken, again = store.remove, [True], asyncio.Event()
    central = Central(payload)

    def remove(release: Any) -> None:
        if broken:
            raise OSError(errno.EACCES, "Permission denied")
        real(release)

    async def watch(request: object, context: object) -> AsyncIterator[fleet_pb2.WatchResponse]:
        yield head_event(others[-1])
        await again.wait()
        yield head_event(active)
        await asyncio.Event().wait()

    monkeypatch.setattr(central, "Watch", watch)
    monkeypatch.setattr(store, "remove", remove)
    async with watching(store, await connect(central), Control(), releases=ReleasesSettings(keep=2)):
        await until(lambda: "old-releases" in trouble(store))
        assert "Permission denied" in trouble(store)["old-releases"].text
        broken.clear()
        again.set()
        await until(lambda: not trouble(store))
