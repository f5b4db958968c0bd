"""The alias follows the channel's head, whatever link, disk and vLLM do."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import AdapterError, ServingError, StorageError
from edge_node.releases.download import fetch_release
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.store import ReleaseStore
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.settings import EdgeSettings, ReleasesSettings, ServingSettings
from protos.fleet.v1 import fleet_pb2
from tests.contract.release_watcher.stand_ins import (
    Central,
    Connect,
    Control,
    Vllm,
    evaluation_event,
    head_event,
    trouble,
    until,
    watching,
)
from tests.fakes.endpoint import at
from tests.fakes.signed_releases import make_payload, make_signed


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
    offer = fleet_pb2.EvaluationOffer(
        offer_id="o1", candidate=signed, reference=signed, tasks=3, deadline_s=20
    )
    central = Central(
        payload,
        [
            fleet_pb2.WatchResponse(
                head=fleet_pb2.ChannelHead(channel="canary", head=other_cohort)
            ),
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


async def test_trouble_of_the_disk_does_not_end_the_watcher(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    train = fleet_pb2.WatchResponse(train=fleet_pb2.TrainOffer(offer_id="t1", max_rank=4))
    central = Central(payload, [train, head_event(signed)], cuts=0)
    full = OSError(errno.ENOSPC, "No space left on device")
    real, failures = (
        store.install,
        [full, StorageError("no space"), sqlite3.OperationalError("disk I/O error")],
    )

    def install(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments)

    offers = [full]
    monkeypatch.setattr(store, "install", install)
    monkeypatch.setattr(
        store, "keep_offer", lambda *_: offers and (_ for _ in ()).throw(offers.pop())
    )
    control = Control()
    async with watching(store, await connect(central), control):
        await until(lambda: ("point", f"lorikeet@{store.check(signed).label}") in control.calls)
    assert not failures
    assert not offers


async def test_a_release_that_was_named_but_not_pointed_at_is_pointed_at_later(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
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
    async with watching(
        store, await connect(Central(payload, [head_event(signed)], cuts=0)), control
    ):
        await until(lambda: ("point", f"lorikeet@{store.check(signed).label}") in control.calls)
    assert not failures


async def test_a_release_of_too_high_a_rank_is_named_and_not_downloaded(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    central = Central(make_payload(), [head_event(make_signed(key, make_payload(), rank=9))])
    async with watching(
        store, await connect(central), Control(), serving=ServingSettings(max_lora_rank=8)
    ):
        await until(
            lambda: any(
                "EDGE_SERVING__MAX_LORA_RANK" in repr(vars(record)) for record in caplog.records
            )
        )
    assert central.offsets == []


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
    assert {release.manifest.version for release in store.newest()} == {1, 3, 4}, (
        "the active one and the newest two"
    )
    assert ("unload", f"lorikeet@{store.check(others[0]).label}") in control.calls


async def test_a_release_that_cannot_be_served_is_a_problem_until_it_is(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.02)
    payload = make_payload()
    broken = [True]

    class Refusing(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            if broken:
                raise ServingError("vLLM refused the adapter")
            await super().load(name, path)

    central = Central(payload, [head_event(make_signed(key, payload))], cuts=0)
    async with watching(store, await connect(central), Refusing()):
        await until(lambda: "releases" in trouble(store))
        problem = trouble(store)["releases"]
        assert (
            problem.text
            == "The release of channel 'stable' is not served: vLLM refused the adapter"
        )
        assert "logs/vllm.log" in problem.next_step
        broken.clear()
        await until(lambda: not trouble(store))


async def test_old_releases_that_cannot_be_removed_are_a_problem_until_they_are(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
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
    async with watching(
        store, await connect(central), Control(), releases=ReleasesSettings(keep=2)
    ):
        await until(lambda: "old-releases" in trouble(store))
        assert "Permission denied" in trouble(store)["old-releases"].text
        broken.clear()
        again.set()
        await until(lambda: not trouble(store))
