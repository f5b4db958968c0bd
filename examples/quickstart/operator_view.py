"""What central knows, as an operator sees it.

In: central's address and the operator's certificate. Out: snapshots of nodes, updates and releases,
and counts made from them. Only the operator service is used, the same one that the `central`
command talks to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from protos.operators.v1 import operators_pb2, operators_pb2_grpc
from protos.updates.v1 import updates_pb2

CALL_TIMEOUT_S = 15.0
EVENTS_PAGE = 5000

UPDATE_STATES = {
    updates_pb2.UPDATE_STATE_WAITING: "waiting",
    updates_pb2.UPDATE_STATE_PLANNED: "planned",
    updates_pb2.UPDATE_STATE_MERGED: "merged",
    updates_pb2.UPDATE_STATE_SUPERSEDED: "superseded",
    updates_pb2.UPDATE_STATE_SET_ASIDE: "set_aside",
    updates_pb2.UPDATE_STATE_QUARANTINED: "quarantined",
    updates_pb2.UPDATE_STATE_FORGOTTEN: "forgotten",
}
RELEASE_STATES = {
    operators_pb2.RELEASE_STATE_CANDIDATE: "candidate",
    operators_pb2.RELEASE_STATE_ACCEPTED: "accepted",
    operators_pb2.RELEASE_STATE_REJECTED: "rejected",
    operators_pb2.RELEASE_STATE_ABANDONED: "abandoned",
    operators_pb2.RELEASE_STATE_WITHDRAWN: "withdrawn",
}


@dataclass(frozen=True)
class Update:
    update_id: str
    node_id: str
    cohort: str
    sequence: int
    state: str
    start_release_id: str
    release_id: str
    reason: str


@dataclass(frozen=True)
class Release:
    release_id: str
    label: str
    cohort: str
    state: str
    channels: tuple[str, ...]
    created_at: str
    updates: tuple[str, ...]
    truncation_error: float
    verdict: str

    @property
    def version(self) -> int:
        """Depth in the release tree; 0 is the base."""
        return int(self.label.removeprefix("v").partition("-")[0])


@dataclass(frozen=True)
class Snapshot:
    """One look at central. `nodes` are the operator service's messages, by node name."""

    nodes: dict[str, operators_pb2.Node]
    updates: tuple[Update, ...]
    releases: tuple[Release, ...]

    def update_counts(self, cohort: str | None = None) -> dict[str, int]:
        """Updates by state, every state present, and `admitted` for all of them."""
        counts = Counter(update.state for update in self.updates if cohort in (None, update.cohort))
        return {state: counts[state] for state in UPDATE_STATES.values()} | {
            "admitted": counts.total()
        }

    def head(self, cohort: str) -> Release | None:
        """The stable head of `cohort`."""
        return next(
            (r for r in self.releases if r.cohort == cohort and "stable" in r.channels), None
        )

    def accepted(self, cohort: str | None = None) -> list[Release]:
        """Accepted merges (version 1 and up), oldest first."""
        chosen = [
            r
            for r in self.releases
            if r.state == "accepted" and r.version > 0 and cohort in (None, r.cohort)
        ]
        return sorted(chosen, key=lambda r: (r.created_at, r.version))

    def cross_cohort_merges(self) -> int:
        """Updates in an accepted release of a cohort that is not their node's. Must be 0."""
        cohort_of_node = {node.node_id: node.cohort for node in self.nodes.values()}
        node_of_update = {update.update_id: update.node_id for update in self.updates}
        return sum(
            cohort_of_node.get(node_of_update.get(update_id, ""), "unknown") != release.cohort
            for release in self.accepted()
            for update_id in release.updates
        )


class OperatorView:
    """An operator's connection to central; open it with `async with`."""

    def __init__(self, address: str, pki: Path) -> None:
        """`pki`: directory with operator.key, operator.pem and ca.pem."""
        self._address = address
        self._pki = pki

    async def __aenter__(self) -> OperatorView:
        credentials = grpc.ssl_channel_credentials(
            root_certificates=(self._pki / "ca.pem").read_bytes(),
            private_key=(self._pki / "operator.key").read_bytes(),
            certificate_chain=(self._pki / "operator.pem").read_bytes(),
        )
        # A central that was killed is back within seconds; the default of gRPC would wait up to two
        # minutes.
        options = [
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.max_receive_message_length", 64 << 20),
        ]
        options.append(("grpc.enable_http_proxy", 0))  # central is on this host
        self._channel = grpc.aio.secure_channel(self._address, credentials, options=options)
        self._stub = operators_pb2_grpc.OperatorServiceStub(self._channel)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close(None)

    async def snapshot(self) -> Snapshot:
        """Raises grpc.aio.AioRpcError while central is away."""
        nodes = await self._stub.ListNodes(operators_pb2.ListNodesRequest(), timeout=CALL_TIMEOUT_S)
        updates = await self._stub.ListUpdates(
            operators_pb2.ListUpdatesRequest(), timeout=CALL_TIMEOUT_S
        )
        releases = await self._stub.ListReleases(
            operators_pb2.ListReleasesRequest(), timeout=CALL_TIMEOUT_S
        )
        return Snapshot(
            nodes={node.name: node for node in nodes.nodes},
            updates=tuple(_update(message) for message in updates.updates),
            releases=tuple(_release(message) for message in releases.releases),
        )

    async def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Every journal event after `after`, oldest first, with its body parsed."""
        events: list[dict[str, Any]] = []
        while True:
            request = operators_pb2.ListEventsRequest(after=after, limit=EVENTS_PAGE)
            page: Sequence[operators_pb2.JournalEvent] = (
                await self._stub.ListEvents(request, timeout=CALL_TIMEOUT_S)
            ).events
            for event in page:
                fields = {
                    name: getattr(event, name)
                    for name in ("sequence", "at", "kind", "cohort", "subject")
                }
                events.append(fields | {"body": json.loads(event.body)})
                after = event.sequence
            if len(page) < EVENTS_PAGE:
                return events


def _update(message: operators_pb2.Update) -> Update:
    return Update(
        update_id=message.update_id,
        node_id=message.node_id,
        cohort=message.cohort,
        sequence=message.sequence,
        state=UPDATE_STATES.get(message.state, "unknown"),
        start_release_id=message.start_release_id,
        release_id=message.release_id,
        reason=message.reason,
    )


def _release(message: operators_pb2.Release) -> Release:
    return Release(
        release_id=message.release_id,
        label=message.version,
        cohort=message.cohort,
        state=RELEASE_STATES.get(message.state, "unknown"),
        channels=tuple(message.channels),
        created_at=message.created_at,
        updates=tuple(message.update_weights),
        truncation_error=message.truncation_error,
        verdict=message.verdict,
    )
