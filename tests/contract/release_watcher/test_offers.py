"""Evaluation offers: each is answered once, by counts or by why there are none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.releases.store import ReleaseStore
from protos.fleet.v1 import fleet_pb2
from tests.contract.release_watcher.endpoint import serving, words
from tests.contract.release_watcher.stand_ins import (
    Central,
    Connect,
    Control,
    evaluation_event,
    head_event,
    trouble,
    until,
    watching,
)
from tests.fakes.broken_environments import SECRET, made
from tests.fakes.signed_releases import make_payload, make_signed


@asynccontextmanager
async def broken(*how: str, **limits: Any) -> AsyncIterator[dict[str, Any]]:
    """An environment named acme in its worker, as `Evaluator` takes it."""
    with made(*how, **limits) as process:
        yield {"acme": (process.spec, process.environment)}


async def test_of_the_offers_that_wait_only_the_newest_is_evaluated(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    """Central goes on without a slow node: it does not wait for what it asked meanwhile."""
    payload = make_payload()
    signed = make_signed(key, payload)
    events = [head_event(signed)]
    for number in range(4):
        event = evaluation_event(signed, signed)
        event.evaluation.offer_id = f"o{number}"
        events.append(event)
    central, heard = Central(payload, events, cuts=0), asyncio.Event()

    class Slow(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
            await heard.wait()
            await super().load(name, path)

    async with watching(store, await connect(central), Slow()):
        await until(lambda: central.watches == 2)  # the first one brought everything
        heard.set()
        await until(lambda: bool(central.reports) and central.reports[-1].offer_id == "o3")
    assert [report.offer_id for report in central.reports] == ["o0", "o3"]


async def test_a_broken_environment_abstains_without_its_words(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [head_event(signed), evaluation_event(signed, signed)], cuts=0)
    async with (
        broken("Tasks", "raise") as environments,
        watching(store, await connect(central), Control(), environments),
    ):
        await until(lambda: bool(central.reports))
    assert re.fullmatch(
        r"Environment 'acme' raised KeyError in tasks \(broken_environments.py:\d+\); "
        r"expected it to raise nothing.",
        central.reports[0].abstain_reason,
    )
    assert SECRET not in caplog.text + repr([vars(record) for record in caplog.records])


async def test_a_release_that_head_and_evaluation_want_at_once_is_downloaded_once(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [evaluation_event(signed, signed), head_event(signed)], cuts=0)
    control = Control()
    async with watching(store, await connect(central), control):
        await until(
            lambda: bool(central.reports) and any(call == "point" for call, _ in control.calls)
        )
    assert central.offsets == [0]
    assert not central.reports[0].abstain_reason


async def test_an_environment_that_raises_is_a_problem_until_an_evaluation_succeeds(
    store: ReleaseStore,
    key: ec.EllipticCurvePrivateKey,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    payload = make_payload()
    signed, again = make_signed(key, payload), asyncio.Event()
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
    mended = tmp_path / "mended"
    async with (
        serving(lambda model, number, body: True) as (url, _),
        broken("Tasks", "raise", str(mended)) as environments,
        watching(store, await connect(central), Control(), environments, url),
    ):
        await until(lambda: "environments" in trouble(store))
        problem = trouble(store)["environments"]
        assert "Environment 'acme' raised KeyError in tasks" in problem.text
        assert "secret" not in problem.text
        assert "EDGE_ENVIRONMENTS" in problem.next_step
        mended.touch()
        again.set()
        await until(lambda: not trouble(store))


@pytest.mark.parametrize("how", ["exit", "nan"])
async def test_an_environment_that_fails_stops_its_own_result_only(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect, how: str
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [evaluation_event(signed, signed)], cuts=0)
    async with (
        serving(lambda model, number, body: True) as (url, _),
        broken("Verifying", how) as environments,
        watching(store, await connect(central), Control(), words() | environments, url),
    ):
        await until(lambda: bool(central.reports) and "environments" in trouble(store))
    assert [result.environment for result in central.reports[0].results] == ["words"]
    assert central.reports[0].results[0].both_passed == 3
    assert not central.reports[0].abstain_reason
    assert set(trouble(store)) == {"environments"}
    problem = trouble(store)["environments"]
    assert problem.text.startswith("Not evaluated: Environment 'acme' ")
    assert "in verify" in problem.text
    assert "edge-node environments check acme" in problem.next_step


async def test_a_worker_that_is_killed_during_an_evaluation_makes_the_node_abstain(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    payload = make_payload()
    signed = make_signed(key, payload)
    central = Central(payload, [evaluation_event(signed, signed)], cuts=0)
    async with (
        serving(lambda model, number, body: True) as (url, _),
        broken("Verifying", "killed") as environments,
        watching(store, await connect(central), Control(), environments, url),
    ):
        await until(lambda: bool(central.reports) and bool(trouble(store)))
    assert not central.reports[0].results
    assert "Environment 'acme' was killed in verify" in central.reports[0].abstain_reason
    assert set(trouble(store)) == {"environments"}


async def test_an_evaluation_that_takes_too_long_is_a_problem_with_the_time_it_had(
    store: ReleaseStore, key: ec.EllipticCurvePrivateKey, connect: Connect
) -> None:
    class Hanging(Control):
        async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
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
    ("code", "stays"),
    [(grpc.StatusCode.INVALID_ARGUMENT, True), (grpc.StatusCode.FAILED_PRECONDITION, False)],
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
