"""The way back to a loaded release waits for nothing, and a release that ends vLLM is left."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import ServingError
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.settings import EdgeSettings, ReleasesSettings
from protos.fleet.v1 import fleet_pb2
from protos.releases.v1 import releases_pb2
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
from tests.fakes.gateway import make_gateway, make_version
from tests.fakes.signed_releases import make_payload, make_signed


class Naming(Central):
    """Names a head whenever the test says so; its downloads may hang."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(payload, cuts=0)
        self.heads: asyncio.Queue[releases_pb2.SignedManifest] = asyncio.Queue()
        self.hangs = False
        self.statuses: list[fleet_pb2.NodeStatus] = []

    async def Watch(self, request, context):
        while True:
            yield head_event(await self.heads.get())

    async def Download(self, request, context):
        self.offsets.append(request.offset)
        yield releases_pb2.DownloadResponse(chunk=self.payload[request.offset :][:10])
        if self.hangs:
            await asyncio.Event().wait()
        yield releases_pb2.DownloadResponse(chunk=self.payload[request.offset :][10:])

    async def ReportStatus(self, request, context):
        self.statuses.append(request.status)
        return fleet_pb2.ReportStatusResponse()


async def test_a_way_back_does_not_wait_for_the_download_of_what_it_replaces(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    central, control = Naming(payload), Control()
    first, second, third = [make_signed(key, payload, version=number) for number in (1, 2, 3)]
    names = [f"lorikeet@{store.check(signed).label}" for signed in (first, second, third)]
    async with watching(store, await connect(central), control):
        for number, signed in enumerate((first, second)):
            await central.heads.put(signed)
            await until(lambda number=number: ("point", names[number]) in control.calls)
        central.hangs = True
        await central.heads.put(third)
        await until(lambda: len(central.offsets) == 3)
        control.calls.clear()
        started = time.monotonic()
        for signed in (third, first):  # said again, as by a new watch, it changes nothing
            await central.heads.put(signed)
        await until(lambda: ("point", names[0]) in control.calls)
        assert time.monotonic() - started < 1
        active = store.active()
        assert active is not None
        assert active.label == store.check(first).label
        central.hangs = False
        await central.heads.put(third)
        await until(lambda: ("point", names[2]) in control.calls)
    assert central.offsets[-1] == 10, "it goes on where it was"


class Answers:
    """A proof that asks vLLM, which is busy; satisfies loaded.Proves."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.asked: list[str] = []
        self.loaded: list[str] = []

    async def load(self, name: str, release: StoredRelease) -> None:
        self.loaded.append(name)
        await self._control.load(name, release.path, proved=False)

    async def expect(
        self, name: str, release: StoredRelease, before: StoredRelease | None, *, made: bool = True
    ) -> None:
        self.asked.append(name)

    def prepare(self, release: StoredRelease, before: StoredRelease | None) -> None:
        return None

    async def aclose(self) -> None:
        return None


async def test_a_way_back_does_not_wait_for_a_proof_that_this_vllm_has_had(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Comparing takes as long as the weights are large; canaries stand behind users' requests."""
    monkeypatch.setattr("edge_node.releases.watcher.LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr(Vllm, "generation", 1)
    payload = make_payload()
    central, control = Naming(payload), Control()
    proof = Answers(control)
    first, second = [make_signed(key, payload, version=number) for number in (1, 2)]
    names = [f"lorikeet@{store.check(signed).label}" for signed in (first, second)]
    async with watching(store, await connect(central), control, proof=proof):
        for number, signed in enumerate((first, second, first)):
            control.calls.clear()
            await central.heads.put(signed)
            name = names[number % 2]
            await until(lambda name=name: ("point", name) in control.calls)
        assert proof.asked == names
        assert proof.loaded == names
        assert ("load", names[0]) in control.calls, "it may have been unloaded meanwhile"
        Vllm.generation = 2  # another vLLM has proved nothing
        control.calls.clear()
        await until(lambda: ("point", names[0]) in control.calls)
        assert proof.asked == [*names, names[0]]
        await central.heads.put(second)
        await until(lambda: ("point", names[1]) in control.calls)
        assert proof.asked == [*names, *names]


async def test_what_has_to_be_loaded_again_is_proved_again(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM forgot it, so that the alias cannot point at it."""
    monkeypatch.setattr("edge_node.releases.watcher.LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr("edge_node.releases.watcher.RETRY_FIRST_S", 0.02)
    payload = make_payload()

    class Forgetful(Control):
        forgets = False

        async def point(self, name: str) -> None:
            if self.forgets:
                self.forgets = False
                raise ServingError(f"{name} is not loaded")
            await super().point(name)

    central, control = Naming(payload), Forgetful()
    proof = Answers(control)
    first, second = [make_signed(key, payload, version=number) for number in (1, 2)]
    names = [f"lorikeet@{store.check(signed).label}" for signed in (first, second)]
    async with watching(store, await connect(central), control, proof=proof):
        for number, signed in enumerate((first, second)):
            await central.heads.put(signed)
            await until(lambda number=number: ("point", names[number]) in control.calls)
        control.calls.clear()
        control.forgets = True
        await central.heads.put(first)
        await until(lambda: ("point", names[0]) in control.calls)
    assert proof.asked == [*names, names[0]]


async def test_a_way_back_does_not_wait_for_another_versions_load(tmp_path: Path) -> None:
    """An evaluation may be loading a large candidate at that moment."""
    gateway = make_gateway(tmp_path)
    old = make_version(tmp_path, "v1")
    await gateway.load("lorikeet@v1", old)
    loading = asyncio.Event()

    async def slow(name: str, path: Path) -> None:
        loading.set()
        await asyncio.Event().wait()

    gateway.engine.load = slow  # type: ignore[method-assign]
    busy = asyncio.create_task(gateway.load("lorikeet@v2", make_version(tmp_path, "v2")))
    await loading.wait()
    async with asyncio.timeout(1):
        await gateway.load("lorikeet@v1", old)
    busy.cancel()


async def test_a_release_that_ends_vllm_is_left_and_central_hears_why(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr("edge_node.releases.watcher.STATUS_PERIOD_S", 0.02)
    monkeypatch.setattr(Vllm, "generation", 1)
    payload = make_payload()
    central, control = Naming(payload), Control()
    good, bad = [make_signed(key, payload, version=number) for number in (1, 2)]
    names = [f"lorikeet@{store.check(signed).label}" for signed in (good, bad)]
    store.activate(store.install(good, payload))
    settings = EdgeSettings(data_dir=tmp_path, releases=ReleasesSettings(crashes=2))
    probation = Probation(settings, store)
    async with watching(
        store, await connect(central), control, probation=probation, releases=settings.releases
    ):
        await central.heads.put(bad)
        await until(lambda: ("point", names[1]) in control.calls)
        for generation in (2, 3):
            control.calls.clear()
            assert probation.ended("killed by SIGKILL", served=True)
            Vllm.generation = generation
            await until(lambda: any(call == "point" for call, _ in control.calls))
        assert ("point", names[0]) in control.calls
        assert ("load", names[1]) not in control.calls
        await until(lambda: "vLLM ended 2 times" in central.statuses[-1].release_problem)
        assert central.statuses[-1].serving_release_id == store.check(good).digest
        assert "vLLM ended 2 times" in trouble(store)["releases"].text
        await central.heads.put(good)
        await until(lambda: "releases" not in trouble(store))
        await central.heads.put(bad)
        await until(lambda: ("point", names[1]) in control.calls)


async def test_a_head_is_not_unloaded_before_it_is_pointed_at(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The oldest release becomes the head again, and old ones are collected meanwhile."""
    payload = make_payload()
    releases = [make_signed(key, payload, version=number) for number in range(1, 5)]
    for signed in releases:
        store.install(signed, payload)
    stored = store.get(store.check(releases[3]).digest)
    assert stored is not None
    store.activate(stored)
    oldest = f"lorikeet@{store.check(releases[0]).label}"
    collected, real = asyncio.Event(), Control.load

    class Slow(Control):
        """The head is loaded; the collector comes before it is pointed at."""

        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            await real(self, name, path)
            if name == oldest:
                watcher[0]._spare.set()
                await asyncio.wait_for(collected.wait(), 20)
                await asyncio.sleep(0.1)

        async def unload(self, name: str) -> None:
            await super().unload(name)
            collected.set()

    watcher: list = []
    central, control = Naming(payload), Slow()
    async with watching(
        store, await connect(central), control, releases=ReleasesSettings(keep=2), made=watcher
    ):
        await central.heads.put(releases[0])
        await until(lambda: ("point", oldest) in control.calls)
    assert ("unload", oldest) not in control.calls
    assert store.get(store.check(releases[0]).digest) is not None
