"""A node of channel `stable` gives a part of its requests to the canary, while there is one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import ServingError
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore
from edge_node.releases_settings import ReleasesSettings
from edge_node.settings import EdgeSettings
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
from tests.fakes.signed_releases import make_payload, make_signed

SETTINGS = ReleasesSettings(canary_share=0.1, crashes=2, keep=2)


class Naming(Central):
    """Names the heads that the test says."""

    def __init__(self, payload: bytes) -> None:
        super().__init__(payload, cuts=0)
        self.news: asyncio.Queue[fleet_pb2.WatchResponse] = asyncio.Queue()

    async def Watch(self, request, context):
        while True:
            yield await self.news.get()

    async def name(self, channel: str, signed: releases_pb2.SignedManifest) -> None:
        await self.news.put(head_event(signed, channel))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("watcher", "canary"):
        monkeypatch.setattr(f"edge_node.releases.{module}.LOOK_PERIOD_S", 0.02)
    monkeypatch.setattr(Vllm, "generation", 1)


def releases(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, count: int
) -> tuple[bytes, list[releases_pb2.SignedManifest], list[str]]:
    payload = make_payload()
    signed = [make_signed(key, payload, version=number) for number in range(1, count + 1)]
    return payload, signed, [f"lorikeet@{store.check(one).label}" for one in signed]


async def test_the_canary_comes_moves_and_goes_with_the_heads(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload, heads, names = releases(store, key, 3)
    central, control = Naming(payload), Control()
    async with watching(store, await connect(central), control, releases=SETTINGS):
        for channel in ("canary", "stable"):  # the same head: there is no canary
            await central.name(channel, heads[0])
        await until(lambda: ("point", names[0]) in control.calls)
        await asyncio.sleep(0.2)
        assert not any(call == "canary" for call, _ in control.calls)
        await central.name("canary", heads[1])
        await until(lambda: control.calls[-1] == ("canary", names[1]))
        assert control.calls[-2] == ("load", names[1])
        await central.name("canary", heads[2])
        await until(lambda: control.calls[-1] == ("canary", names[2]))
        await asyncio.sleep(0.1)
        assert ("point", names[1]) not in control.calls
        assert control.calls.count(("canary", names[2])) == 1, "said once"
        # vLLM is started anew: it knows no canary.
        control.calls.clear()
        Vllm.generation = 2
        await until(lambda: ("canary", names[2]) in control.calls)
        assert ("point", names[0]) in control.calls
        # The canary becomes stable.
        await central.name("stable", heads[2])
        await until(lambda: control.calls[-1] == ("canary", ""))
        assert ("point", names[2]) in control.calls
        assert trouble(store) == {}
        active = store.active()
        assert active is not None
        assert active.label == names[2].partition("@")[2]


async def test_the_canary_is_never_unloaded(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    """It is older than what is kept, as after a rollback of the canary."""
    payload, heads, names = releases(store, key, 5)
    for signed in heads:
        store.install(signed, payload)
    central, control = Naming(payload), Control()
    async with watching(store, await connect(central), control, releases=SETTINGS):
        await central.name("canary", heads[0])
        await central.name("stable", heads[4])
        await until(lambda: ("unload", names[1]) in control.calls)
        await until(lambda: ("canary", names[0]) in control.calls)
        await central.name("stable", heads[3])
        await until(lambda: ("point", names[3]) in control.calls)
        await asyncio.sleep(0.1)
    assert ("unload", names[0]) not in control.calls


async def test_a_canary_that_cannot_be_loaded_or_ends_vllm_leaves_stable_alone(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload, heads, names = releases(store, key, 2)
    settings = EdgeSettings(data_dir=tmp_path, releases=SETTINGS)
    store.activate(store.install(heads[0], payload))
    probation = Probation(settings, store)
    broken = [True]

    class Refusing(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            if broken and name == names[1]:
                raise ServingError("vLLM refused the adapter")
            await super().load(name, path)

    central, control = Naming(payload), Refusing()
    async with watching(
        store, await connect(central), control, releases=SETTINGS, probation=probation
    ):
        await central.name("stable", heads[0])
        await central.name("canary", heads[1])
        await until(lambda: "canary" in trouble(store))
        assert trouble(store)["canary"].text == (
            "The release of channel 'canary' gets no request here: vLLM refused the adapter"
        )
        assert "releases" not in trouble(store), "stable is served"
        broken.clear()
        await until(lambda: control.calls[-1] == ("canary", names[1]))
        await until(lambda: trouble(store) == {})
        for generation in (2, 3):
            assert probation.ended("killed by SIGKILL", served=True)
            control.calls.clear()
            Vllm.generation = generation
            await until(lambda: ("point", names[0]) in control.calls)
            if generation == 2:
                await until(lambda: ("canary", names[1]) in control.calls)
        await until(lambda: "canary" in trouble(store))
        assert "vLLM ended 2 times soon after it got release v2" in trouble(store)["canary"].text
        await asyncio.sleep(0.1)
        assert all(names[1] != name for _, name in control.calls)
        await until(lambda: "releases" not in trouble(store))
        active = store.active()
        assert active is not None
        assert active.label == names[0].partition("@")[2]
