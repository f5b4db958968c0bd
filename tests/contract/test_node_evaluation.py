"""A node answers evaluation offers: real HTTP to a stand-in for vLLM, looks, references, attempts, and what cannot be had."""

# ruff: noqa: F811 (pytest fixtures of another module)

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.environments import Task
from edge_node.errors import AdapterError, EnvironmentFault, ServingError
from edge_node.releases.comparison import Comparison
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.releases.store import ReleaseStore
from edge_node.settings import EnvironmentSpec
from protos.fleet.v1 import fleet_pb2
from protos.manifest import sha256_hex
from protos.releases.v1 import releases_pb2
from tests.contract.test_release_watcher import (  # noqa: F401
    Central,
    Connect,
    Control,
    connect,
    head_event,
    key,
    store,
    trouble,
    until,
    watching,
)
from tests.fakes.endpoint import at
from tests.fakes.word_environment import NextWord
from tests.unit.edge_node.releases.test_release_store import make_payload, make_signed

Answer = Callable[[str, int, dict[str, Any]], bool]
"""(model, number of the word, request) -> whether the answer is right."""
GREEDY = Sampling()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """URL of an endpoint that answers `w7` with `w8` or wrongly, and the requests it got."""
    requests: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        assert request.headers["x-lorikeet-capture"] == "off"
        requests.append(body)
        number = int(body["messages"][0]["content"][1:])
        right = answer(body["model"], number, body)
        message = {"role": "assistant", "content": f"w{number + 1}" if right else "wrong"}
        return web.json_response({"model": body["model"], "choices": [{"message": message}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", requests
    finally:
        await runner.cleanup()


def words(last: int = 100, name: str = "words", anchor: bool = False) -> dict[str, Any]:
    """`last // 2` held-out tasks."""
    return {name: (EnvironmentSpec(name=name, factory="x:Y", anchor=anchor), NextWord(0, last))}


def counts(result: Any) -> tuple[int, int, int, int]:
    return result.both_passed, result.only_reference_passed, result.only_candidate_passed, result.neither_passed


def asked(requests: list[dict[str, Any]], model: str) -> list[str]:
    return [body["messages"][0]["content"] for body in requests if body["model"] == model]


async def test_looks_ask_tasks_that_no_earlier_look_had_until_there_are_none() -> None:
    async with serving(lambda model, number, body: model == "new" or number % 4 == 1) as (url, requests):
        evaluator = Evaluator(at(url), words(anchor=True), seed=7)
        looks = [
            await evaluator.compare("words", "new", "old", first, tasks, GREEDY)
            for first, tasks in ((0, 20), (20, 20), (40, 40), (80, 80))
        ]
    assert [sum(counts(result)) for result in looks] == [20, 20, 10, 0]
    assert [result.first_task for result in looks] == [0, 20, 40, 80]
    assert sum(result.only_candidate_passed for result in looks) == 25
    assert len(set(asked(requests, "new"))) == len(asked(requests, "new")) == 50
    assert sorted(asked(requests, "old")) == sorted(asked(requests, "new"))
    assert len({result.tasks_digest for result in looks}) == 4
    assert all(result.anchor and not result.HasField("every_attempt") for result in looks)
    assert {body["temperature"] for body in requests} == {0}


async def test_the_same_tasks_in_another_order_have_the_same_digest() -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        whole = [await Evaluator(at(url), words(20), seed).compare("words", "n", "o", 0, 10, GREEDY) for seed in (1, 2)]
        part = [await Evaluator(at(url), words(), seed).compare("words", "n", "o", 0, 10, GREEDY) for seed in (1, 2)]
    assert whole[0].tasks_digest == whole[1].tasks_digest
    assert part[0].tasks_digest != part[1].tasks_digest


class Unordered(NextWord):
    """Breaks the contract: a larger count begins with other tasks."""

    def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
        return super().tasks(split, count=count, seed=seed + count)


class Bounded(NextWord):
    def tasks(self, split: Any, *, count: int, seed: int) -> Sequence[Task]:
        if count > 20:
            raise ValueError("there are 20 tasks, and here is one of them")
        return super().tasks(split, count=count, seed=seed)


@pytest.mark.parametrize("environment", [Unordered(), Bounded()])
async def test_an_environment_that_cannot_give_further_tasks_gives_none(
    environment: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        evaluator = Evaluator(at(url), {"e": (EnvironmentSpec(name="e", factory="x:Y"), environment)})
        assert sum(counts(await evaluator.compare("e", "new", "old", 0, 20, GREEDY))) == 20
        assert sum(counts(await evaluator.compare("e", "new", "old", 20, 20, GREEDY))) == 0
    assert "here is one of them" not in caplog.text + repr([vars(record) for record in caplog.records])


async def test_several_attempts_share_their_seeds_and_count_pass_1_and_pass_k() -> None:
    tries: dict[tuple[str, int], int] = {}

    def answer(model: str, number: int, body: dict[str, Any]) -> bool:
        tries[model, number] = tries.get((model, number), 0) + 1
        return model == "old" or number % 3 == 0 or tries[model, number] < 3

    async with serving(answer) as (url, requests):
        result = await Evaluator(at(url), words()).compare("words", "new", "old", 0, 30, Sampling(3, 0.8))
    third = len([word for word in set(asked(requests, "new")) if int(word[1:]) % 3 == 0])
    assert counts(result) == (30, 0, 0, 0)
    assert counts(result.every_attempt) == (third, 30 - third, 0, 0)
    assert result.attempts == 3
    seeds = {
        model: {(b["messages"][0]["content"], b["seed"]) for b in requests if b["model"] == model}
        for model in ("new", "old")
    }
    assert seeds["new"] == seeds["old"]
    assert len(seeds["old"]) == 90
    assert {body["temperature"] for body in requests} == {0.8}


async def test_attempts_end_with_the_first_that_fails() -> None:
    async with serving(lambda model, number, body: False) as (url, requests):
        result = await Evaluator(at(url), words()).compare("words", "new", "old", 0, 10, Sampling(5, 0.8))
    assert counts(result) == counts(result.every_attempt) == (0, 0, 0, 10)
    assert len(requests) == 20


# Which releases.


def signed(name: str) -> releases_pb2.SignedManifest:
    return releases_pb2.SignedManifest(manifest=name.encode(), signature=b"s")


def identity(name: str) -> str:
    return sha256_hex(name.encode())


def offer(*suites: fleet_pb2.EnvironmentSuite, only_suites: bool = False, **fields: Any) -> fleet_pb2.EvaluationOffer:
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
        self, url: str, environments: dict[str, Any], what: fleet_pb2.EvaluationOffer, last_try: bool = False
    ) -> dict[str, Any]:
        comparison = Comparison(Evaluator(at(url), environments), self.obtain, self.held.append)
        return {result.environment: result for result in await comparison.run(what, last_try=last_try)}


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
        assert {name: (result.first_task, sum(counts(result))) for name, result in results.items()} == {"b": (10, 25)}
        with pytest.raises(AdapterError, match="no environment that the evaluation asks for"):
            await Releases().run(url, words(name="z"), offer(suite, only_suites=True))


class NotFound(grpc.aio.AioRpcError):
    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), grpc.aio.Metadata(), "its payload is gone")


BEST_OF_B = fleet_pb2.EnvironmentSuite(environment="b", reference_id=identity("best"))


@pytest.mark.parametrize(
    ("trouble", "said"), [(AdapterError("rank 99"), "rank 99"), (NotFound(), "NOT_FOUND: its payload is gone")]
)
async def test_a_reference_that_cannot_be_had_is_replaced_by_the_parent(trouble: Exception, said: str) -> None:
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
        results = await Releases(best=busy).run(url, words(name="b"), offer(BEST_OF_B), last_try=True)
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
    suite = fleet_pb2.EnvironmentSuite(environment="words", reference_id=hashlib.sha256(best.manifest).hexdigest())
    what = fleet_pb2.EvaluationOffer(
        offer_id="o1", candidate=candidate, reference=parent, references=[best], suites=[suite], tasks=8, deadline_s=20
    )
    central = Central(payload, [head_event(parent), fleet_pb2.WatchResponse(evaluation=what)], cuts=0)
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


class Judging(NextWord):
    def verify(self, task: Task, answer: str) -> Any:
        raise KeyError(f"the customer's words: {answer}")


async def test_a_verifier_that_raises_is_named_without_its_words() -> None:
    async with serving(lambda model, number, body: True) as (url, _):
        evaluator = Evaluator(at(url), {"acme": (EnvironmentSpec(name="acme", factory="x:Y"), Judging())})
        with pytest.raises(
            EnvironmentFault, match=r"Environment 'acme' raised KeyError in verify \(.*\.py:\d+\)"
        ) as raised:
            await evaluator.compare("acme", "new", "old", 0, 5, GREEDY)
    assert "customer" not in str(raised.value)


async def test_a_vllm_that_refuses_evaluations_is_a_problem(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    """As with `--api-key` that the node does not know: every evaluation got 401, and status said nothing."""

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
    offer = fleet_pb2.EvaluationOffer(offer_id="o1", candidate=signed, reference=signed, tasks=3, deadline_s=20)
    central = Central(payload, [head_event(signed), fleet_pb2.WatchResponse(evaluation=offer)], cuts=0)
    environments = {"e": (EnvironmentSpec(name="e", factory="x:Y"), NextWord())}
    async with watching(store, await connect(central), Control(), environments, f"http://127.0.0.1:{port}"):
        await until(lambda: "evaluation" in trouble(store))
    await runner.cleanup()
    assert "vLLM answered 401 to an evaluation request" in trouble(store)["evaluation"].text
    assert "401" in central.reports[0].abstain_reason
