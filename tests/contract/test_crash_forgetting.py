"""SIGKILL for central when an order to forget cannot be carried out: it ends as without a kill.

The story: two nodes upload and are released (version 1). While their next merge is evaluated, b's
update in version 1 is ordered to be forgotten, and the payload of a's, which the replay reads, is
lost. Version 2 is released, the removal cannot be made, the order ends. The payload is restored, it
is ordered again: version 3 is made without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from central.cli.verify import verify_on_disk
from central.journal import EventKind
from protos.manifest import sha256_hex
from protos.operators.v1 import operators_pb2
from tests.contract import central_harness as harness
from tests.contract.crash_ending import PAYLOADS
from tests.contract.crash_story import Story, prepare, tell

FAULTS = ("journal.forget_failed.applied#1", "journal.forget_failed.stored#1")


class FailingRemovalStory(Story):
    """Node a evaluates when it is told to; an operator looks at the journal before an order."""

    def _node_work(self) -> list[Coroutine[Any, Any, None]]:
        return []

    async def _tell(self) -> None:
        a = self._nodes[0]
        evaluating = [asyncio.create_task(self._evaluate(a))]
        try:
            for number in (0, 1):
                await self._upload(number, a.genesis)
            first = await self._head_with(lambda head: head.version == 1)
            evaluating.pop().cancel()
            for number in (2, 3):
                await self._upload(number, first)
            await self._until(EventKind.CANDIDATE_BUILT, 2)
            await self._forget(1)
            lost = self._blob(0)
            lost.rename(self._folder / "lost")
            evaluating.append(asyncio.create_task(self._evaluate(a)))
            await self._until(EventKind.FORGET_FAILED, 1)
            (self._folder / "lost").rename(lost)
            await self._forget(2)
            await self._head_with(lambda head: head.version == 3)
        finally:
            for task in evaluating:
                task.cancel()

    async def _until(self, kind: EventKind, count: int) -> None:
        async def step(central: harness.Central) -> bool:
            return (await self._kinds(central)).count(kind) >= count

        while not await self._again(step):
            await asyncio.sleep(0.05)

    async def _forget(self, orders: int) -> None:
        """So that there are so many orders."""

        async def step(central: harness.Central) -> None:
            if (await self._kinds(central)).count(EventKind.FORGET_ORDERED) < orders:
                request = operators_pb2.ForgetRequest(target=self._sent[1])
                await central.operators.Forget(request, timeout=10)

        await self._again(step)

    def _blob(self, number: int) -> Path:
        digest = sha256_hex(PAYLOADS[number])
        return self._settings.data_dir / "blobs" / digest[:2] / digest


@pytest.mark.slow
async def test_a_killed_central_ends_an_order_that_cannot_be_carried_out_as_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "prepared").mkdir()
    prepared = await prepare(tmp_path / "prepared")
    whole, kills = await tell(prepared, tmp_path / "whole", None, kind=FailingRemovalStory)
    assert kills == 0
    assert whole.merged_in == [(1, "merged"), (0, "forgotten"), (2, "merged"), (2, "merged")]
    assert (whole.verdicts, len(whole.payloads), whole.leftovers) == ([True] * 3, 1 + 3, [])
    for number, fault in enumerate(FAULTS):
        folder = tmp_path / f"killed-{number}"
        assert (fault, *await tell(prepared, folder, fault, kind=FailingRemovalStory)) == (
            fault,
            whole,
            1,
        )
        settings = prepared[0].model_copy(update={"data_dir": folder / "central"})
        findings = await asyncio.to_thread(verify_on_disk, settings, "", "", True)
        assert {finding.outcome for finding in findings} == {"identical"}
