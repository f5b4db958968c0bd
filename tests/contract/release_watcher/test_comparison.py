"""Which releases an offer compares: per environment its reference, else the parent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import AdapterError, ServingError
from edge_node.releases.comparison import Comparison
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.store import ReleaseStore
from edge_node.settings import EnvironmentSpec
from protos.fleet.v1 import fleet_pb2
from protos.manifest import sha256_hex
from protos.releases.v1 import releases_pb2
from tests.contract.release_watcher.endpoint import counts, serving, words
from tests.contract.release_watcher.stand_ins import (
    Central,
    Connect,
    Control,
    head_event,
    trouble,
    until,
    watching,
)
from tests.fakes.endpoint import at
from tests.fakes.signed_releases import make_payload, make_signed
from tests.fakes.word_environment import NextWord


def signed(name: str) -> releases_pb2.SignedManifest:
    return releases_pb2.SignedManifest(manifest=name.encode(), signature=b"s")


def identity(name: str) -> str:
    return sha256_hex(name.encode())


def offer(
    *suites: fleet_pb2.EnvironmentSuite, only_suites: bool = False, **fields: Any
) -> fleet_pb2.EvaluationOffer:
    return fleet_pb2.EvaluationOffer(
        offer_id="o1",
        candidate=signed("new"),
        reference=signed("parent"),
        tasks=10,
        references=[signed("best")],
        suites=suites,
        only_suites=only_suites,
        **fields,
    )


class Releases:
    """Stands for disk and vLLM: what was wanted, what cannot be had, what is held."""

    def __init__(self, **broken: Exception) -> None:
        self.obtained: list[str] = []
        self.held: list[tuple[str, ...]] = []
        self.broken = broken

    async def obtain(self, release: releases_pb2.SignedManifest) -> str:
        name = release.manifest.decode()
        if name in self.broken:
            raise self.broken[name]
        self.obtained.append(name)
        return name

    async def run(
        self,
        url: str,
        environments: dict[str, Any],
        what: fleet_pb2.EvaluationOffer,
        last_try: bool = False,
    ) -> dict[str, Any]:
        comparison = Comparison(Evaluator(at(url), environments), self.obtain, self.held.append)
        return {
            result.environment: result for result in await comparison.run(what, last_try=last_try)
        }


async def test_each_environment_is_compared_with_its_own_reference() -> None:
    environments = words(name="a") | words(name="b") | words(name="c")
    suite = fleet_pb2.EnvironmentSuite(environment="b", reference_id=identity("best"))
    releases = Releases()
    async with serving(lambda model, number, body: model != "parent") as (url, _):
        results = await releases.run(url, environments, offer(suite))
    assert {name: counts(result) for name, result in results.items()} == {
        "a": (0, 0, 10, 0),
        "b": (10, 0, 0, 0),
        "c": (0, 0, 10, 0),
    }
    assert {name: result.reference_id for name, result in results.items()} == {
        "a": identity("parent"),
        "b": identity("best"),
        "c": identity("parent"),
    }
    assert releases.obtained == ["new", "parent", "new", "best"], "one reference at a time"
    assert releases.held[-1] == (identity("new"), identity("best"), identity("parent"))


async def test_a_later_look_asks_only_what_it_names() -> None:
    environments = words(name="a") | words(name="b")
    suite = fleet_pb2.EnvironmentSuite(environment="b", first_task=10, tasks=25)
    async with serving(lambda model, number, body: True) as (url, _):
        results = await Releases().run(url, environments, offer(suite, only_suites=True))
        assert {
            name: (result.first_task, sum(counts(result))) for name, result in results.items()
        } == {"b": (10, 25)}
        with pytest.raises(AdapterError, match="no environment that the evaluation asks for"):
            await Releases().run(url, words(name="z"), offer(suite, only_suites=True))


class NotFound(grpc.aio.AioRpcError):
    def __init__(self) -> None:
        super().__init__(
            grpc.StatusCode.NOT_FOUND,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            "its payload is gone",
        )


BEST_OF_B = fleet_pb2.EnvironmentSuite(environment="b", reference_id=identity("best"))


@pytest.mark.parametrize(
    ("trouble", "said"),
    [(AdapterError("rank 99"), "rank 99"), (NotFound(), "NOT_FOUND: its payload is gone")],
)
async def test_a_reference_that_cannot_be_had_is_replaced_by_the_parent(
    trouble: Exception, said: str
) -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        results = await Releases(best=trouble).run(url, words(name="b"), offer(BEST_OF_B))
        stranger = fleet_pb2.EnvironmentSuite(environment="b", reference_id=identity("stranger"))
        unknown = await Releases().run(url, words(name="b"), offer(stranger))
    assert (results["b"].reference_id, results["b"].fallback_reason) == (identity("parent"), said)
    assert "does not carry" in unknown["b"].fallback_reason
    assert counts(results["b"]) == (10, 0, 0, 0)


async def test_a_passing_trouble_is_tried_again_before_the_parent_takes_the_place() -> None:
    busy = ServingError("vLLM is restarting")
    async with serving(lambda model, number, body: True) as (url, _):
        with pytest.raises(ServingError):
            await Releases(best=busy).run(url, words(name="b"), offer(BEST_OF_B))
        results = await Releases(best=busy).run(
            url, words(name="b"), offer(BEST_OF_B), last_try=True
        )
        assert results["b"].fallback_reason == "vLLM is restarting"
        for broken in ("new", "parent"):
            with pytest.raises(ServingError):
                await Releases(**{broken: busy, "best": busy}).run(
                    url, words(name="b"), offer(BEST_OF_B), last_try=True
                )


async def test_a_reference_that_the_node_no_longer_has_is_downloaded_loaded_and_reported(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    tmp_path: Path,
) -> None:
    payload = make_payload()
    best, parent, candidate = (make_signed(key, payload, version=number) for number in (1, 4, 5))
    store.activate(store.install(parent, payload))
    suite = fleet_pb2.EnvironmentSuite(
        environment="words", reference_id=hashlib.sha256(best.manifest).hexdigest()
    )
    what = fleet_pb2.EvaluationOffer(
        offer_id="o1",
        candidate=candidate,
        reference=parent,
        references=[best],
        suites=[suite],
        tasks=8,
        deadline_s=20,
    )
    central = Central(
        payload, [head_event(parent), fleet_pb2.WatchResponse(evaluation=what)], cuts=0
    )
    control = Control()
    names = [f"lorikeet@{store.check(release).label}" for release in (best, candidate)]
    channel = await connect(central)
    async with (
        serving(lambda model, number, body: model == names[0]) as (url, _),
        watching(store, channel, control, words(), evaluation_url=url),
    ):
        await until(lambda: bool(central.reports))
    (result,) = central.reports[0].results
    assert counts(result) == (0, 8, 0, 0)
    assert (result.reference_id, result.fallback_reason) == (suite.reference_id, "")
    assert {("load", name) for name in names} <= set(control.calls)


async def test_a_vllm_that_refuses_evaluations_is_a_problem(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    """As with an operator's middleware that lets nobody in: every evaluation got 401."""

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=401)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", refuse)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    payload = make_payload()
    signed = make_signed(key, payload)
    offer = fleet_pb2.EvaluationOffer(
        offer_id="o1", candidate=signed, reference=signed, tasks=3, deadline_s=20
    )
    central = Central(
        payload, [head_event(signed), fleet_pb2.WatchResponse(evaluation=offer)], cuts=0
    )
    environments = {"e": (EnvironmentSpec(name="e", factory="x:Y"), NextWord)}
    async with watching(
        store, await connect(central), Control(), environments, f"http://127.0.0.1:{port}"
    ):
        await until(lambda: "evaluation" in trouble(store) and bool(central.reports))
    await runner.cleanup()
    assert "vLLM answered 401 to an evaluation request" in trouble(store)["evaluation"].text
    assert "401" in central.reports[0].abstain_reason
