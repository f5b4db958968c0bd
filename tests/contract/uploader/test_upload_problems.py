"""The uploader as it runs on, and the problems that it reports until they are over."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from edge_node.outbox import Outbox, OutboxEntry, OutboxState, Uploader
from edge_node.problems import Problems
from edge_node.settings import EdgeSettings
from tests.contract.uploader.scripted_central import (
    IDENTITY,
    SETTINGS,
    Clock,
    ScriptedCentral,
    add_update,
    node,
    serving,
    trouble,
)


async def test_run_uploads_what_another_process_adds_and_ends_with_aclose(
    outbox: Outbox, tmp_path: Path
) -> None:
    central, clock = ScriptedCentral(), Clock()
    quick = EdgeSettings.model_validate({"outbox": {"retry_s": 0.01}})
    async with serving(central) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        uploader = Uploader(outbox, channel, IDENTITY, quick, clock)
        running = asyncio.create_task(uploader.run())
        add_update(Outbox(tmp_path, "auto"), 1, b"payload")
        async with asyncio.timeout(5):
            while not outbox.list(OutboxState.ADMITTED):
                await asyncio.sleep(0.01)
        await uploader.aclose()
        await uploader.aclose()
        await asyncio.wait_for(running, 5)


async def test_an_outbox_that_cannot_be_read_for_a_while_ends_nothing(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    central, real = ScriptedCentral(), outbox.list
    failures = [sqlite3.OperationalError("database is locked"), OSError("disk")]

    def listing(*states: OutboxState) -> Sequence[OutboxEntry]:
        if failures:
            raise failures.pop()
        return real(*states)

    monkeypatch.setattr(outbox, "list", listing)
    update_id = add_update(outbox, 1, b"payload")
    async with serving(central) as port, node(outbox, port, Clock()) as uploader:
        running = asyncio.create_task(uploader.run())
        async with asyncio.timeout(20):
            while update_id not in central.admitted:
                assert not running.done(), running.result()
                await asyncio.sleep(0.02)
        await uploader.aclose()
        await running


async def test_one_update_that_arrives_does_not_hide_one_that_does_not(outbox: Outbox) -> None:
    central, clock = ScriptedCentral(), Clock()
    first = add_update(outbox, 1, b"one")
    add_update(outbox, 2, b"two")

    async def refuse_the_first(
        update_id: str, number: int, context: grpc.aio.ServicerContext
    ) -> None:
        if update_id == first:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    central.script = refuse_the_first
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert f"Update {first[:12]} could not be uploaded" in trouble()
        [problem] = Problems(SETTINGS.data_dir).current()
        assert "edge-node doctor" in problem.next_step
        central.script, clock.now = None, 100
        await uploader.upload_waiting()
        assert trouble() == ""


async def test_a_refused_update_is_a_problem_until_a_later_one_is_admitted_also_after_a_restart(
    outbox: Outbox,
) -> None:
    central, clock = ScriptedCentral(), Clock()
    refused = add_update(outbox, 1, b"one")

    async def refuse(update_id: str, number: int, context: grpc.aio.ServicerContext) -> None:
        context.set_trailing_metadata((("lorikeet-reason", "BAD_TENSOR"),))
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "module q has NaN")

    central.script = refuse
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
    expected = f"Central refused update {refused[:12]} (#1) for good: BAD_TENSOR: module q has NaN"
    assert trouble() == expected
    async with serving(central) as port, node(outbox, port, clock) as uploader:
        await uploader.upload_waiting()
        assert trouble() == expected, "nothing waits, and nothing has been admitted since"
        central.script = None
        add_update(outbox, 2, b"two")
        await uploader.upload_waiting()
    assert trouble() == ""


async def test_an_outbox_that_cannot_be_read_is_a_problem_while_it_lasts(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = EdgeSettings.model_validate({"outbox": {"retry_s": 0.01}})
    broken = [True]
    real = outbox.list

    def listing(*states: OutboxState) -> Sequence[OutboxEntry]:
        if broken:
            raise sqlite3.OperationalError("disk I/O error")
        return real(*states)

    monkeypatch.setattr(outbox, "list", listing)
    async with (
        serving(ScriptedCentral()) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        uploader = Uploader(outbox, channel, IDENTITY, quick)
        running = asyncio.create_task(uploader.run())
        async with asyncio.timeout(5):
            while "disk I/O error" not in trouble():
                await asyncio.sleep(0.01)
            broken.clear()
            while trouble():
                await asyncio.sleep(0.01)
        await uploader.aclose()
        await running
