"""SIGKILL for central while a canary soaks and while a cohort that builds on shared is composed.

The story: two nodes upload, their release soaks on canary until central makes it stable; acme,
which builds on shared, is composed with it and then learns something of its own. Two more updates
become a canary that the operator rolls back before any node serves it; they wait, are merged again,
soak, and are stable; acme is composed with that release too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest

from central.cli.verify import verify_on_disk
from protos.fleet.v1 import fleet_pb2
from protos.manifest import sha256_hex
from protos.releases.v1 import releases_pb2
from tests.contract.crash_ending import Ending
from tests.contract.crash_story import Story, prepare, tell

QUICK = "journal.canary_reported.stored#1"
EVERY = [
    "journal.canary_reported.applied#1",
    "journal.canary_reported.applied#2",
    "merge.own_kept#1",  # a composition
    "merge.own_kept#2",  # a merge in the own chain
    "journal.candidate_built.stored#2",
    "journal.promoted.applied#1",  # with the verdict: it appears on canary
    "journal.promoted.stored#1",
    "journal.promoted.applied#2",  # central's own: it is stable
    "journal.promoted.stored#2",
    "journal.rolled_back.applied#1",
    "journal.rolled_back.stored#1",
]


class ChannelStory(Story):
    """Node a follows canary, node c is of cohort acme."""

    policy: ClassVar[Mapping[str, str]] = {
        "CENTRAL_COHORTS__BUILDS_ON": '{"acme": "shared"}',
        "CENTRAL_CHANNELS__COHORTS": '{"shared": {"first": "canary", "soak_s": 0.3}}',
        "CENTRAL_MERGE__COHORTS": '{"acme": {"min_updates": 1}}',
    }
    _serves = True

    def _node_work(self) -> list[Coroutine[Any, Any, None]]:
        a, _, c = self._nodes
        return [self._evaluate(a), self._evaluate(c), self._follow()]

    async def _tell(self) -> None:
        a, _, c = self._nodes
        for number in (0, 1):
            await self._upload(number, a.genesis)
        first = await self._head_with(lambda head: head.version == 1)
        composed = await self._head_with(lambda head: head.version == 1, node=c)
        await self._upload(4, composed, c)
        await self._head_with(lambda head: head.version == 2, node=c)
        self._serves = False
        for number in (2, 3):
            await self._upload(number, first)
        await self._head_with(lambda head: head.version == 2, "canary")
        await self._roll_back(first, "canary")
        self._serves = True
        await self._head_with(lambda head: head.version == 2)
        await self._head_with(lambda head: head.version == 3, node=c)

    async def _follow(self) -> None:
        """Node a serves what canary points at, and says so; a new central is told anew."""
        node = self._nodes[0]
        while True:
            try:
                answer = await node.releases.GetHead(
                    releases_pb2.GetHeadRequest(channel="canary"), timeout=10
                )
                if self._serves:
                    status = fleet_pb2.NodeStatus(
                        channel="canary", serving_release_id=sha256_hex(answer.head.manifest)
                    )
                    await node.fleet.ReportStatus(
                        fleet_pb2.ReportStatusRequest(status=status), timeout=10
                    )
            except grpc.aio.AioRpcError:
                pass  # central is being killed or started
            await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


async def check(folder: Path, tmp_path: Path, fault: str) -> None:
    nodes = {"a": "shared", "b": "shared", "c": "acme"}
    prepared = await prepare(folder, nodes, cohorts={"builds_on": {"acme": "shared"}})
    ending, kills = await tell(prepared, tmp_path, fault, kind=ChannelStory)
    assert kills == 1
    expect_whole(ending)
    settings = prepared[0].model_copy(update={"data_dir": tmp_path / "central"})
    findings = await asyncio.to_thread(verify_on_disk, settings, "", "", False)
    assert {finding.outcome for finding in findings} == {"identical"}


def expect_whole(ending: Ending) -> None:
    """Nothing lost, nothing twice: version that holds each update, in order of upload."""
    assert ending.merged_in == [
        (1, "merged"),
        (1, "merged"),
        (2, "merged"),
        (2, "merged"),
        (2, "merged"),
    ]
    assert (ending.admissions, ending.rollbacks, set(ending.verdicts)) == (5, 1, {True})
    # Two merges of shared and the one that was rolled back; acme: two compositions and a merge.
    assert len(ending.verdicts) == 6
    assert (len(ending.payloads), ending.leftovers) == (3 + 4, [])


async def test_a_central_killed_while_a_canary_soaks_goes_on(folder: Path, tmp_path: Path) -> None:
    await check(folder, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("fault", EVERY)
async def test_every_step_of_channels_and_composition(tmp_path: Path, fault: str) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "story").mkdir()
    await check(tmp_path / "prepared", tmp_path / "story", fault)
