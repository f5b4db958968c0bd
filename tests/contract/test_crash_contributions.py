"""SIGKILL for central at every step of orders on contributions, of enrolment and revocation.

The story: two nodes upload and are released (version 1); b is asked to evaluate and hangs, so that
it is silent from then on. An update of a is set aside and waits again; b is put in quarantine,
sends two updates from one start that are kept aside, and is released: version 2. c enrols, uploads
and is revoked. b's update in version 1 is forgotten: version 3 is made without it. a says that it
serves version 3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.cli.verify import verify_on_disk
from central.journal import EventKind, read_journal
from protos.fleet.v1 import fleet_pb2
from protos.manifest import ReleaseManifest
from protos.operators.v1 import operators_pb2
from tests.contract import central_harness as harness
from tests.contract.crash_ending import PAYLOADS, Ending
from tests.contract.crash_story import CONTRIBUTIONS, Story, prepare, tell

QUICK = "journal.candidate_built.stored#3"  # the removal
UNREACHED = "forget_failed"  # test_crash_forgetting.py
EVERY = [
    *(
        f"journal.{event}.{step}#1"
        for event in CONTRIBUTIONS
        if event != UNREACHED
        for step in ("applied", "stored")
    ),
    "journal.update_set_aside.stored#2",  # in one append with the revocation
    "journal.merge_planned.applied#3",  # the removal, step by step
    "journal.merge_planned.stored#3",
    "merge.computed#3",
    "merge.candidate_kept#3",
    "journal.candidate_built.applied#3",
    "journal.evaluation_offered.stored#5",
    "journal.evaluation_reported.applied#5",
    "journal.verdict.applied#3",
    "journal.verdict.stored#3",
    "journal.promoted.stored#3",
]


class ContributionStory(Story):
    """An operator asks before each order what of it the journal has already."""

    policy: ClassVar[Mapping[str, str]] = {"CENTRAL_GATE__DEADLINE_S": "3"}

    def _node_work(self) -> list[Coroutine[Any, Any, None]]:
        return [*super()._node_work(), self._hang(self._nodes[1])]

    async def _hang(self, node: harness.Node) -> None:
        """The node hears every evaluation offer and answers none."""
        while True:
            try:
                async for _ in node.fleet.Watch(fleet_pb2.WatchRequest()):
                    pass
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)

    async def _tell(self) -> None:
        a, b = self._nodes
        for number in (0, 1):
            await self._upload(number, a.genesis)
        first = await self._head_with(lambda head: head.version == 1)
        await self._upload(2, first)
        await self._order(EventKind.UPDATE_SET_ASIDE, lambda c: c.SetAsideUpdates, self._aside(2))
        await self._order(
            EventKind.NODE_QUARANTINED,
            lambda c: c.QuarantineNode,
            operators_pb2.QuarantineNodeRequest(node_id=b.node_id, reason="odd"),
        )
        await self._upload(3, first, b)
        await self._upload(4, first, b)
        requeue = operators_pb2.RequeueUpdatesRequest(updates=[self._id(2)])
        await self._order(EventKind.UPDATE_REQUEUED, lambda c: c.RequeueUpdates, requeue)
        release = operators_pb2.ReleaseNodeRequest(node_id=b.node_id)
        await self._order(EventKind.NODE_RELEASED, lambda c: c.ReleaseNode, release)
        second = await self._head_with(lambda head: head.version == 2)
        await self._join_and_leave(second)
        forget = operators_pb2.ForgetRequest(target=self._id(1))
        await self._order(EventKind.FORGET_ORDERED, lambda c: c.Forget, forget)
        third = await self._head_with(lambda head: head.version == 3)
        await self._serve(third)

    async def _order(self, kind: EventKind, call: Callable[[Any], Any], request: Any) -> None:
        async def step(central: harness.Central) -> None:
            if kind not in await self._kinds(central):
                await call(central.operators)(request, timeout=10)

        await self._again(step)

    async def _join_and_leave(self, start: ReleaseManifest) -> None:
        key = ec.generate_private_key(ec.SECP256R1())

        async def join(central: harness.Central) -> harness.Node:
            return await central.enroll("c", await central.token(), key)

        c = await self._again(join)
        request = operators_pb2.RevokeNodeRequest(node_id=c.node_id)

        async def send(central: harness.Central) -> None:
            mine = await central.enroll(
                "c", await central.token(), key
            )  # a channel to the central that runs now
            await self._upload(5, start, mine)

        await self._again(send)
        await self._order(EventKind.NODE_REVOKED, lambda c: c.RevokeNode, request)

    async def _serve(self, release: ReleaseManifest) -> None:
        status = fleet_pb2.ReportStatusRequest(
            status=fleet_pb2.NodeStatus(serving_release_id=release.digest)
        )

        async def step(central: harness.Central) -> bool:
            await self._nodes[0].fleet.ReportStatus(status, timeout=10)
            return EventKind.RELEASE_SERVED in await self._kinds(central)

        assert await self._again(step)

    def _aside(self, number: int) -> operators_pb2.SetAsideUpdatesRequest:
        return operators_pb2.SetAsideUpdatesRequest(updates=[self._id(number)], reason="odd")

    def _id(self, number: int) -> str:
        return self._sent[number]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


async def check(folder: Path, tmp_path: Path, fault: str) -> None:
    prepared = await prepare(folder)
    ending, kills = await tell(prepared, tmp_path, fault, kind=ContributionStory)
    assert kills == 1
    expect_whole(ending)
    settings = prepared[0].model_copy(update={"data_dir": tmp_path / "central"})
    findings = await asyncio.to_thread(verify_on_disk, settings, "", "", True)
    assert {finding.outcome for finding in findings} == {"identical"}
    kinds = await asyncio.to_thread(
        lambda: [event.kind for event in read_journal(settings.journal_url)]
    )
    assert kinds.count(EventKind.NODE_SILENT) == 1, "b held up one candidate, and no other"


def expect_whole(ending: Ending) -> None:
    """Nothing lost, nothing twice: version that holds each update, in order of upload."""
    assert ending.merged_in == [
        (1, "merged"),
        (0, "forgotten"),
        (2, "merged"),
        (0, "superseded"),
        (2, "merged"),
        (0, "set_aside"),
    ]
    assert len(PAYLOADS) == ending.admissions == 6
    assert (ending.verdicts, ending.rollbacks, ending.leftovers) == ([True] * 3, 0, [])
    assert len(ending.payloads) == 1 + 3


async def test_a_central_killed_while_something_is_forgotten_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    await check(folder, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("fault", EVERY)
async def test_every_step_of_orders_on_contributions(tmp_path: Path, fault: str) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "story").mkdir()
    await check(tmp_path / "prepared", tmp_path / "story", fault)
