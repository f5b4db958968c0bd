"""One story of a central that is killed at a fault point, restarted, and driven on to its end.

In: a prepared data directory and a fault (or none). Out: the ending. The driver does what nodes
and an operator do: it repeats each step until central has answered, whatever dies meanwhile.

The story: two nodes upload, a merge passes the gate (version 1); two more updates start from it
(version 2); the operator rolls back to version 1 and requeues; the same two updates are merged
again (version 2 anew).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import grpc

from central.faults import VARIABLE
from central.fleet.pki import Pki
from central.journal import EventKind
from central.settings import CentralSettings
from protos.base import read_base_model
from protos.fleet.v1 import fleet_pb2
from protos.manifest import ReleaseManifest, Start, sha256_hex, verify
from protos.operators.v1 import operators_pb2
from protos.releases.v1 import releases_pb2
from tests.contract import central_harness as harness
from tests.contract.crash_ending import PAYLOADS, Ending, read_ending

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 90.0

CONTRIBUTIONS = (
    "token_created",
    "token_revoked",
    "node_enrolled",
    "node_revoked",
    "node_quarantined",
    "node_released",
    "node_silent",
    "update_superseded",
    "update_set_aside",
    "update_requeued",
    "forget_ordered",
    "forget_failed",
    "release_served",
)
"""Kinds of events of what nodes and operators do besides merges; test_crash_contributions.py."""


class Story:
    """Runs `central serve` on a data directory of its own."""

    policy: ClassVar[Mapping[str, str]] = {}
    """Further settings of central."""

    def __init__(
        self, folder: Path, settings: CentralSettings, nodes: list[harness.Node], fault: str | None
    ) -> None:
        self.kills = 0
        self._folder = folder
        self._settings = settings
        self._nodes = nodes
        self._fault = fault
        self._process: asyncio.subprocess.Process | None = None
        self._stack = AsyncExitStack()
        self._resent_bytes = 0
        self._sent: dict[int, str] = {}
        """Update ids by number."""

    async def run(self) -> Ending:
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._start(self._fault)
                watches = [asyncio.create_task(work) for work in self._node_work()]
                try:
                    await self._tell()
                finally:
                    for watch in watches:
                        watch.cancel()
                    await asyncio.gather(*watches, return_exceptions=True)
                await self._stop()
        finally:
            await self._stack.aclose()
            if self._process is not None and self._process.returncode is None:
                self._process.kill()
                await self._process.wait()
        return await asyncio.to_thread(read_ending, self._settings.data_dir, self._resent_bytes)

    def _node_work(self) -> list[Coroutine[Any, Any, None]]:
        """What nodes do by themselves; node b never evaluates."""
        return [self._evaluate(self._nodes[0])]

    async def _tell(self) -> None:
        genesis = self._nodes[0].genesis
        for number in (0, 1):
            await self._upload(number, genesis)
        first = await self._head_with(lambda head: head.version == 1)
        for number in (2, 3):
            await self._upload(number, first)
        await self._head_with(lambda head: head.version == 2)
        await self._roll_back(first)
        await self._head_with(lambda head: head.version == 2)

    # Steps, each repeated until central has answered.

    async def _again(self, step: Callable[[harness.Central], Any]) -> Any:
        """`step`'s result; starts central again whenever it was killed."""
        while True:
            assert self._process is not None
            if self._process.returncode is not None:
                assert self._process.returncode == -signal.SIGKILL, self._process.returncode
                self.kills += 1
                await self._start(None)
            try:
                return await step(self._central)
            except grpc.aio.AioRpcError as error:
                passing = (
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.CANCELLED,
                    grpc.StatusCode.UNKNOWN,
                )
                if error.code() not in passing and harness.reason(error) != "WRONG_OFFSET":
                    raise
                with suppress(
                    TimeoutError
                ):  # the process that died may not have been waited for yet
                    await asyncio.wait_for(self._process.wait(), 0.5)

    async def _upload(
        self, number: int, start: ReleaseManifest, node: harness.Node | None = None
    ) -> None:
        node, payload = node or self._nodes[number % 2], PAYLOADS[number]
        begin = Start(
            release=start.digest,
            payload=start.payload.digest_sha256,
            prefix_rank=0,
            dtype="float32",
        )
        manifest = node.manifest(payload, number + 1, start=begin)
        self._sent[number] = manifest.digest
        self._resent_bytes -= len(payload)

        async def step(central: harness.Central) -> None:
            del central
            known = await node.query(manifest.digest)
            receipt = known.receipt
            if not known.HasField("receipt"):
                self._resent_bytes += len(payload) - known.committed_bytes
                receipt = await node.upload(payload, manifest, offset=known.committed_bytes)
            verify(node.answer.release_key_pem, receipt.body, receipt.signature)

        await self._again(step)

    async def _head_with(
        self,
        wanted: Callable[[ReleaseManifest], bool],
        channel: str = "stable",
        node: harness.Node | None = None,
    ) -> ReleaseManifest:
        async def step(central: harness.Central) -> ReleaseManifest | None:
            del central
            request = releases_pb2.GetHeadRequest(channel=channel)
            answer = await (node or self._nodes[0]).releases.GetHead(request, timeout=10)
            head = ReleaseManifest.from_bytes(answer.head.manifest)
            return head if wanted(head) else None

        while True:
            found = await self._again(step)
            if found is not None:
                assert isinstance(found, ReleaseManifest)
                return found
            await asyncio.sleep(0.05)

    async def _roll_back(self, target: ReleaseManifest, channel: str = "stable") -> None:
        """An operator asks again only when the journal does not show the rollback."""

        async def step(central: harness.Central) -> None:
            if EventKind.ROLLED_BACK in await self._kinds(central):
                return
            request = operators_pb2.RollbackReleaseRequest(
                cohort="shared",
                release=target.digest,
                updates=operators_pb2.ABANDONED_UPDATES_REQUEUE,
                channel=channel,
            )
            await central.operators.RollbackRelease(request, timeout=10)

        await self._again(step)

    async def _kinds(self, central: harness.Central) -> list[str]:
        """Of the journal's events, in order."""
        answer = await central.operators.ListEvents(
            operators_pb2.ListEventsRequest(limit=1000), timeout=10
        )
        return [event.kind for event in answer.events]

    async def _evaluate(self, node: harness.Node) -> None:
        """Reports a few more tasks passed with the candidate: too few for the first look."""
        while True:
            try:
                async for event in node.fleet.Watch(fleet_pb2.WatchRequest()):
                    if event.WhichOneof("event") == "evaluation":
                        first_task = next(
                            (suite.first_task for suite in event.evaluation.suites), 0
                        )
                        result = releases_pb2.EnvironmentResult(
                            environment="e",
                            tasks_digest=sha256_hex(str(first_task).encode()),
                            first_task=first_task,
                            both_passed=14,
                            only_reference_passed=2,
                            only_candidate_passed=4,
                        )
                        report = releases_pb2.ReportEvaluationRequest(
                            offer_id=event.evaluation.offer_id, results=[result]
                        )
                        await node.releases.ReportEvaluation(report, timeout=10)
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.1)

    # The process.

    async def _start(self, fault: str | None) -> None:
        settings = self._settings
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("CENTRAL_", VARIABLE))
        }
        environment |= {
            "CENTRAL_DATA_DIR": str(settings.data_dir),
            "CENTRAL_BASE__PATH": str(settings.base.path),
            "CENTRAL_LISTEN__PORT": str(settings.listen.port),
            "CENTRAL_LISTEN__ENROLLMENT_PORT": str(settings.listen.enrollment_port),
            "CENTRAL_MERGE__STRATEGY": settings.merge.strategy,
            "CENTRAL_GATE__TASKS": "20",
            "CENTRAL_GATE__MAX_TASKS": "40",  # a second look decides
            "CENTRAL_GATE__ABSENT_GRACE_S": "0.5",  # node b never evaluates
            **self.policy,
            **({VARIABLE: fault} if fault else {}),
        }
        with (self._folder / "central.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "central.cli", "serve",
                cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:  # a fault point on the way to readiness
            await self._process.wait()
            assert self._process.returncode == -signal.SIGKILL, (
                self._folder / "central.log"
            ).read_text()[-2000:]
            self.kills += 1
            await self._start(None)
            return
        await self._connect()

    async def _connect(self) -> None:
        class Seen:
            pki = Pki.load_or_create(self._settings.data_dir, [])
            base = read_base_model(self._settings.base.path or Path())

        self._central = harness.Central(
            Seen(),  # type: ignore[arg-type]
            self._settings,
            self._stack,
        )

    async def _stop(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(self._process.wait(), 30) in (0, -signal.SIGKILL)


async def prepare(
    folder: Path,
    nodes: Mapping[str, str] = MappingProxyType({"a": "shared", "b": "shared"}),
    **groups: Any,
) -> tuple[CentralSettings, list[harness.Node]]:
    """A central with enrolled nodes (cohort by name), not running; copied for every story."""
    settings = harness.make_settings(folder, **groups)
    async with harness.running_central(settings) as central:
        enrolled = [
            await central.enroll(name, await central.token(cohort))
            for name, cohort in nodes.items()
        ]
    return settings, enrolled


async def tell(
    prepared: tuple[CentralSettings, list[harness.Node]],
    folder: Path,
    fault: str | None,
    strategy: str = "product-mean",
    kind: type[Story] = Story,
) -> tuple[Ending, int]:
    """The story's end on a copy of the prepared central, and how often central was killed."""
    settings, nodes = prepared
    shutil.copytree(settings.data_dir, folder / "central")
    ports = harness.make_settings(folder).listen
    merge = settings.merge.model_copy(update={"strategy": strategy})
    settings = settings.model_copy(
        update={"data_dir": folder / "central", "listen": ports, "merge": merge}
    )
    async with AsyncExitStack() as stack:
        own = [await _reconnect(node, settings, stack) for node in nodes]
        story = kind(folder, settings, own, fault)
        return await story.run(), story.kills


async def _reconnect(
    node: harness.Node, settings: CentralSettings, stack: AsyncExitStack
) -> harness.Node:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = node.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    ca = (settings.data_dir / "pki" / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, pem, node.answer.certificate_pem)
    # Central starts again within a second; gRPC's own pause would be longer.
    options = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200))
    channel = grpc.aio.secure_channel(f"localhost:{settings.listen.port}", credentials, options)
    stack.push_async_callback(channel.close)
    return harness.Node(node.node_id, node.key, node.answer, channel)
