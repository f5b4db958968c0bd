"""The alias moves to a release that was proved, and to no other."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import Damaged, NotProved, ServingError
from edge_node.figures.tally import TALLY
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.probation import Probation
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.releases.watcher import ReleaseWatcher
from edge_node.settings import EdgeSettings
from protos.fleet.v1 import fleet_pb2
from tests.contract.release_watcher.stand_ins import (
    IDLE,
    Central,
    Connect,
    Control,
    Vllm,
    evaluation_event,
    head_event,
    trouble,
    until,
)
from tests.fakes.endpoint import at
from tests.fakes.signed_releases import make_payload, make_signed


class Proofs:
    """Finds the versions in `wrong_weights` and `wrong_answers` not served; remembers the rest."""

    def __init__(self, control: Control) -> None:
        self.control = control
        self.wrong_weights: set[int] = set()
        self.wrong_answers: set[int] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.closed = False
        self.damaged: list[int] = []
        """How many times it finds a directory damaged."""

    async def load(self, name: str, release: StoredRelease) -> None:
        if self.damaged:
            self.damaged = [self.damaged[0] - 1] if self.damaged[0] > 1 else []
            raise Damaged(f"Release {release.label} is damaged on disk")
        await self.control.load(name, release.path)
        if release.manifest.version in self.wrong_weights:
            raise NotProved("3 of its modules are not held")

    async def expect(
        self, name: str, release: StoredRelease, before: StoredRelease | None, *, made: bool = True
    ) -> None:
        version = release.manifest.version
        self.calls.append((version, before.manifest.version if before else None, made))
        if version in self.wrong_answers:
            raise NotProved("it answers as the base does")

    def prepare(self, release: StoredRelease, before: StoredRelease | None) -> None:
        self.calls.append(("prepare", release.manifest.version))

    async def aclose(self) -> None:
        self.closed = True


class Node:
    def __init__(
        self,
        store: ReleaseStore,
        channel: grpc.aio.Channel,
        tmp_path: Path,
        probation: Probation | None = None,
    ) -> None:
        self.control, self.vllm = Control(), Vllm()
        self.proofs = Proofs(self.control)
        self.watcher = ReleaseWatcher(
            EdgeSettings(data_dir=tmp_path),
            channel,
            store,
            self.vllm,
            self.control,  # type: ignore[arg-type]
            Evaluator(at("http://127.0.0.1:9"), dict(IDLE)),  # type: ignore[arg-type]
            fleet_pb2.NodeStatus,
            tuple,
            proof=self.proofs,
            probation=probation,
        )

    async def __aenter__(self) -> Node:
        self.task = asyncio.create_task(self.watcher.run())
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def pointed(self) -> list[str]:
        return [name for call, name in self.control.calls if call == "point"]


def named(store: ReleaseStore, signed: Any) -> str:
    return f"lorikeet@{store.check(signed).label}"


@pytest.mark.parametrize("kind", ["wrong_weights", "wrong_answers"])
async def test_the_alias_stays_where_it_is_and_central_hears_why(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.05)
    payload = make_payload()
    good, bad = (make_signed(key, payload, version=number) for number in (1, 2))
    store.activate(store.install(good, payload))
    central = Central(payload, [head_event(bad)], cuts=0)
    before = dict(TALLY.proofs)
    async with Node(store, await connect(central), tmp_path) as node:
        getattr(node.proofs, kind).add(2)
        await until(lambda: "releases" in trouble(store))
        assert node.pointed() == [named(store, good)]
        active = store.active()
        assert active is not None
        assert active.manifest.version == 1
        status = node.watcher._status()
        assert "not held" in status.release_problem or "as the base" in status.release_problem
        assert status.serving_release_id == active.release_id
        getattr(node.proofs, kind).clear()
        await until(lambda: node.pointed()[-1:] == [named(store, bad)])
        await until(lambda: not trouble(store))
        assert (2, 1, True) in node.proofs.calls, "compared with the release before it"
    for result in ("passed", "failed"):
        assert TALLY.proofs[result] > before.get(result, 0), "Prometheus sees it"
    assert node.proofs.closed


async def test_a_start_serves_the_newest_release_that_is_proved(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload = make_payload()
    signed = [make_signed(key, payload, version=number) for number in (1, 2, 3)]
    for one in signed:
        last = store.install(one, payload)
    store.activate(last)
    async with Node(store, await connect(Central(payload, [])), tmp_path) as node:
        node.proofs.wrong_answers.add(3)
        await until(lambda: bool(node.pointed()))
        assert node.pointed() == [named(store, signed[1])]
        active = store.active()
        assert active is not None
        assert active.manifest.version == 2
        assert all(not made for *_, made in node.proofs.calls if made in (True, False))


async def test_a_release_that_was_not_proved_is_not_to_blame_for_an_end_of_vllm(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload = make_payload()
    good, bad = (store.install(make_signed(key, payload, version=n), payload) for n in (1, 2))
    store.activate(good)
    probation = Probation(EdgeSettings(data_dir=tmp_path), store)
    probation.switching(bad)
    store.activate(bad)
    async with Node(store, await connect(Central(payload, [])), tmp_path, probation) as node:
        node.proofs.wrong_answers.add(2)
        await until(lambda: node.pointed() == [f"lorikeet@{good.label}"])
        await until(lambda: bad.release_id not in probation.needed)
    assert not probation.ended("killed by SIGKILL", served=True)
    assert probation.why_avoided(bad.release_id) is None


async def test_a_damaged_release_stays_until_central_can_give_it_again(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that could not be read for a moment must not cost the only release."""
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.05)
    payload = make_payload()
    signed = make_signed(key, payload)
    stored = store.install(signed, payload)
    store.activate(stored)
    alone = Central(payload, [], cuts=0)
    async with Node(store, await connect(alone), tmp_path) as node:
        node.proofs.damaged = [5]
        await until(lambda: not node.proofs.damaged and bool(node.pointed()))
        assert stored.path.exists()
    assert alone.offsets == []
    named_again = Central(payload, [head_event(signed)], cuts=0)
    async with Node(store, await connect(named_again), tmp_path) as node:
        node.proofs.damaged = [1000]
        await until(lambda: bool(named_again.offsets))
        assert "damaged on disk" in trouble(store)["releases"].text
        node.proofs.damaged = []
        await until(lambda: bool(node.pointed()))


async def test_a_start_without_any_proved_release_points_nowhere_and_says_so(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload = make_payload()
    store.activate(store.install(make_signed(key, payload), payload))
    async with Node(store, await connect(Central(payload, [])), tmp_path) as node:
        node.proofs.wrong_answers.add(1)
        await until(lambda: "releases" in trouble(store))
        assert node.pointed() == []
        assert "as the base does" in trouble(store)["releases"].text


async def test_a_candidate_whose_weights_are_not_held_is_not_evaluated(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, tmp_path: Path
) -> None:
    payload = make_payload()
    head, candidate = (make_signed(key, payload, version=number) for number in (1, 2))
    central = Central(payload, [head_event(head), evaluation_event(candidate, head)], cuts=0)
    async with Node(store, await connect(central), tmp_path) as node:
        node.proofs.wrong_weights.add(2)
        await until(lambda: bool(central.reports))
        assert "not held" in central.reports[0].abstain_reason
        assert ("prepare", 1) in node.proofs.calls


async def test_a_start_goes_back_to_its_release_when_the_head_fails_too(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM does not answer at first, and central's head is one that it does not serve."""
    monkeypatch.setattr("edge_node.releases.watcher.HEAD_RETRY_LAST_S", 0.05)
    monkeypatch.setattr("edge_node.releases.watcher.LOOK_PERIOD_S", 0.05)
    payload = make_payload()
    good, bad = (make_signed(key, payload, version=number) for number in (1, 2))
    store.activate(store.install(good, payload))
    central = Central(payload, [head_event(bad)], cuts=0)
    async with Node(store, await connect(central), tmp_path) as node:
        failures, real = [1], node.control.load

        async def load(name: str, path: Path, *, proved: bool = True) -> None:
            if failures and node.watcher._head is not None:
                failures.pop()
                raise ServingError("vLLM's control socket did not answer")
            await real(name, path)

        async def ready() -> int:
            while node.watcher._head is None:
                await asyncio.sleep(0.01)
            return 1

        node.control.load = load  # type: ignore[method-assign]
        node.vllm.wait_ready = ready  # type: ignore[method-assign]
        node.proofs.wrong_answers.add(2)
        await until(lambda: bool(node.pointed()))
        assert node.pointed() == [named(store, good)]
        assert "releases" in trouble(store)
