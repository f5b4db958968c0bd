"""FleetService: the line on which a node hears everything it must know.

In: watches and status reports of nodes. Out: channel heads, the standing train offer and open
evaluation offers at once, then every change, and a heartbeat. A watch compares what its node should
know with what it was told, so a slow reader never makes a queue grow and nothing is lost between
two looks. A revoked node's watch ends, and with a heartbeat that of a certificate that has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Any

import grpc

from central.fleet.identity import Authenticator
from central.fleet.presence import Presence
from central.fleet.served import record_served
from central.fleet.streams import OpenStreams
from central.journal import EvaluationRecord, Event, EventKind, Journal, NodeRecord, State
from central.releases.canary import record_report
from central.releases.registry import CHANNELS
from central.releases.service import channel_head, signed_manifest
from protos.encoding import ENCODINGS
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc

log = logging.getLogger(__name__)
Context = grpc.aio.ServicerContext[Any, Any]

HEARTBEAT_S = 10.0
MAX_DEADLINE_S = 2**32 - 1
_WAKING = frozenset(
    {
        EventKind.PROMOTED,
        EventKind.ROLLED_BACK,
        EventKind.TRAIN_OFFERED,
        EventKind.EVALUATION_OFFERED,
        EventKind.NODE_REVOKED,
        EventKind.NODE_QUARANTINED,
        EventKind.NODE_RELEASED,
    }
)


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Served on the mutual-TLS port. Made on the event loop that serves it."""

    def __init__(
        self,
        journal: Journal,
        authenticator: Authenticator,
        presence: Presence,
        heartbeat_s: float,
        max_watches: int,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self._journal = journal
        self._authenticator = authenticator
        self._presence = presence
        self._heartbeat_s = heartbeat_s
        self._clock = clock or journal.now
        self._closing = False
        self._open = OpenStreams("watches", max_watches, "CENTRAL_LIMITS__NODE_WATCHES")
        self._watches: dict[asyncio.Event, str] = {}
        self._loop = asyncio.get_running_loop()
        self._unsubscribe = journal.add_listener(self._heard)

    async def Watch(
        self, request: fleet_pb2.WatchRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.WatchResponse]:
        node = await self._authenticator.node(context)
        with self._open.one(node.node_id):
            changed = asyncio.Event()
            self._watches[changed] = node.cohort
            self._presence.opened(node.node_id)
            log.info("node connected", extra={"node_id": node.node_id, "cohort": node.cohort})
            told: set[str] = set()
            try:
                await self._told(node, request.status)
                while not self._closing:
                    changed.clear()
                    node = await asyncio.to_thread(
                        self._authenticator.enrolled, self._authenticator.peer(context)
                    )
                    wanted = await asyncio.to_thread(self._wanted, node)
                    for key, event in wanted.items():
                        if key not in told:
                            yield event
                    told = set(wanted)
                    try:
                        await asyncio.wait_for(changed.wait(), self._heartbeat_s)
                    except TimeoutError:
                        yield fleet_pb2.WatchResponse(heartbeat=fleet_pb2.Heartbeat())
            finally:
                del self._watches[changed]
                self._presence.closed(node.node_id)
                log.info("node disconnected", extra={"node_id": node.node_id})

    async def ReportStatus(
        self, request: fleet_pb2.ReportStatusRequest, context: Context
    ) -> fleet_pb2.ReportStatusResponse:
        node = await self._authenticator.node(context)
        await self._told(node, request.status)
        return fleet_pb2.ReportStatusResponse()

    async def _told(self, node: NodeRecord, status: fleet_pb2.NodeStatus) -> None:
        """A node says how it fares.

        Presence keeps all of it. The journal keeps what the node serves and what concerns a canary.
        """
        self._presence.report(node.node_id, status)
        await asyncio.to_thread(
            record_served, self._journal, node.node_id, status.serving_release_id
        )
        await asyncio.to_thread(
            record_report,
            self._journal,
            node.node_id,
            node.cohort,
            status.channel,
            status.serving_release_id,
            status.release_problem,
        )

    def close(self) -> None:
        """End every watch; idempotent."""
        self._closing = True
        self._unsubscribe()
        for changed in self._watches:
            changed.set()

    def _heard(self, event: Event) -> None:
        if event.kind in _WAKING:
            try:
                self._loop.call_soon_threadsafe(self._wake, event.cohort)
            except RuntimeError:  # the loop is closed: nobody watches any more
                pass

    def _wake(self, cohort: str) -> None:
        for changed, watched in self._watches.items():
            if watched == cohort:
                changed.set()

    def _wanted(self, node: NodeRecord) -> dict[str, fleet_pb2.WatchResponse]:
        """What the node should know now, by a key that changes when the news does."""
        with self._journal.read() as state:
            wanted: dict[str, fleet_pb2.WatchResponse] = {}
            for channel in CHANNELS:
                release = channel_head(state, node.cohort, channel)
                head = fleet_pb2.ChannelHead(channel=channel, head=signed_manifest(release))
                wanted[f"head {channel} {release.release_id}"] = fleet_pb2.WatchResponse(head=head)
            standing = fleet_pb2.NodeStanding(quarantine=state.nodes[node.node_id].quarantine)
            wanted[f"standing {standing.quarantine}"] = fleet_pb2.WatchResponse(standing=standing)
            offer = state.train_offers.get(node.cohort)
            if offer is not None:
                train = fleet_pb2.TrainOffer(
                    offer_id=offer.offer_id, max_rank=offer.max_rank, encodings=ENCODINGS
                )
                wanted[f"train {offer.offer_id}"] = fleet_pb2.WatchResponse(train=train)
            candidates = [
                plan.candidate
                for plan in state.open_plans(node.cohort)
                if plan.candidate is not None
            ]
            for record in (
                offer for candidate in candidates for offer in state.offers_of(candidate)
            ):
                left_s = self._left_s(record, node)
                if left_s > 0:
                    wanted[f"evaluation {record.offer_id}"] = _evaluation(state, record, left_s)
            return wanted

    def _left_s(self, record: EvaluationRecord, node: NodeRecord) -> float:
        """Seconds in which a report of this node still counts; 0 when it is not waited for."""
        if node.node_id not in record.nodes or node.node_id in record.reports:
            return 0.0
        return (datetime.fromisoformat(record.deadline_at) - self._clock()).total_seconds()


def _evaluation(state: State, record: EvaluationRecord, left_s: float) -> fleet_pb2.WatchResponse:
    references = {*record.references.values()} - {record.reference}
    return fleet_pb2.WatchResponse(
        evaluation=fleet_pb2.EvaluationOffer(
            offer_id=record.offer_id,
            candidate=signed_manifest(state.releases[record.candidate]),
            reference=signed_manifest(state.releases[record.reference]),
            tasks=record.tasks,
            deadline_s=min(max(1, int(left_s)), MAX_DEADLINE_S),
            references=[signed_manifest(state.releases[release]) for release in sorted(references)],
            suites=[
                fleet_pb2.EnvironmentSuite(
                    environment=name,
                    reference_id=record.references.get(name, ""),
                    first_task=suite.first_task,
                    tasks=suite.tasks,
                )
                for name in sorted(record.references.keys() | record.suites.keys())
                if (suite := record.suite(name)) is not None
            ],
            only_suites=bool(record.suites),
            attempts=record.attempts,
            temperature=record.temperature,
        )
    )
