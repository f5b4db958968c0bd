"""OperatorService: what an operator may ask and order.

In: calls with the operator's certificate. Out: listings, join tokens, and journal events for every
order. Guarantee: no call is answered without an operator's certificate; an order is in the journal
before it is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import grpc

from central.blobs import BlobStore
from central.errors import Reason, Refused
from central.fleet.identity import Authenticator
from central.fleet.presence import Presence
from central.fleet.quarantine import quarantine_node, release_node
from central.fleet.revocation import revoke_node, unknown_node
from central.fleet.tokens import create_token, expect_sensible, revoke_token
from central.journal import Journal, NodeRecord, ReleaseRecord, State
from central.operators.contributions import requeue, set_aside
from central.operators.figures import each_figures, figures_of
from central.operators.forgetting import (
    Proposal,
    cancel_forget,
    describe,
    order_forget,
    propose_forget,
)
from central.operators.lineage import diff_releases, explain_release
from central.operators.listing import (
    event_message,
    forget_message,
    merges_under_way,
    node_message,
    release_message,
    token_message,
    update_message,
)
from central.releases import Registry
from central.releases.registry import unknown_cohort
from central.retention.collector import Collection, Collector
from central.settings import ChannelSettings
from protos.operators.v1 import operators_pb2, operators_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_EVENTS = 1_000
MAX_EVENTS = 10_000
MAX_SEQUENCE = 2**63 - 1
"""A database's largest integer."""
_CHOICES: dict[int, Literal["requeue", "set_aside"]] = {
    operators_pb2.ABANDONED_UPDATES_REQUEUE: "requeue",
    operators_pb2.ABANDONED_UPDATES_SET_ASIDE: "set_aside",
}


class OperatorService(operators_pb2_grpc.OperatorServiceServicer):
    """Served on the mutual-TLS port."""

    def __init__(
        self,
        journal: Journal,
        registry: Registry,
        blobs: BlobStore,
        authenticator: Authenticator,
        presence: Presence,
        ca_pem: bytes,
        channels: ChannelSettings,
        collector: Collector,
        failure: Callable[[str], str],
        shortage: Callable[[], str],
    ) -> None:
        self._journal = journal
        self._registry = registry
        self._blobs = blobs
        self._authenticator = authenticator
        self._presence = presence
        self._ca_pem = ca_pem
        self._collector = collector
        self._failure = failure
        self._shortage = shortage
        self._channels = channels

    async def ListNodes(
        self, request: operators_pb2.ListNodesRequest, context: Context
    ) -> operators_pb2.ListNodesResponse:
        nodes = await self._ask(context, lambda by: self._nodes())
        return operators_pb2.ListNodesResponse(
            nodes=[node_message(node, self._presence.of(node.node_id)) for node in nodes]
        )

    async def CreateToken(
        self, request: operators_pb2.CreateTokenRequest, context: Context
    ) -> operators_pb2.CreateTokenResponse:
        def create(by: str) -> tuple[str, str]:
            expect_sensible(request.uses, request.valid_s)
            self._registry.ensure_cohort(request.cohort)
            return create_token(
                self._journal,
                self._ca_pem,
                request.cohort,
                request.uses,
                request.valid_s,
                by,
                request.readmit_node_id,
            )

        token, token_id = await self._ask(context, create)
        return operators_pb2.CreateTokenResponse(token=token, token_id=token_id)

    async def ListTokens(
        self, request: operators_pb2.ListTokensRequest, context: Context
    ) -> operators_pb2.ListTokensResponse:
        def list_tokens(by: str) -> list[operators_pb2.Token]:
            now = self._journal.now()
            with self._journal.read() as state:
                _expect_cohort(state, request.cohort)
                tokens = [
                    token for token in state.tokens.values() if request.cohort in ("", token.cohort)
                ]
                return [token_message(token, now) for token in tokens]

        return operators_pb2.ListTokensResponse(tokens=await self._ask(context, list_tokens))

    async def RevokeToken(
        self, request: operators_pb2.RevokeTokenRequest, context: Context
    ) -> operators_pb2.RevokeTokenResponse:
        token = await self._ask(
            context, lambda by: revoke_token(self._journal, request.token_id, by)
        )
        return operators_pb2.RevokeTokenResponse(token=token_message(token, self._journal.now()))

    async def RevokeNode(
        self, request: operators_pb2.RevokeNodeRequest, context: Context
    ) -> operators_pb2.RevokeNodeResponse:
        done = await self._ask(context, lambda by: revoke_node(self._journal, request.node_id, by))
        return operators_pb2.RevokeNodeResponse(
            token_id=done.token_id, ended_uses=done.ended_uses, other_node_ids=done.others
        )

    async def ListReleases(
        self, request: operators_pb2.ListReleasesRequest, context: Context
    ) -> operators_pb2.ListReleasesResponse:
        def list_releases(by: str) -> list[operators_pb2.Release]:
            with self._journal.read() as state:
                _expect_cohort(state, request.cohort)
                wanted = (
                    release
                    for release in state.releases.values()
                    if request.cohort in ("", release.cohort)
                )
                return [
                    release_message(state, release, self._channels, continual)
                    for release, continual in each_figures(state, wanted)
                ]

        releases = await self._ask(context, list_releases)
        return operators_pb2.ListReleasesResponse(
            releases=releases,
            standstills=self._standstills(request.cohort),
            merging=merges_under_way(request.cohort),
        )

    async def GetRelease(
        self, request: operators_pb2.GetReleaseRequest, context: Context
    ) -> operators_pb2.GetReleaseResponse:
        release = await self._ask(
            context, lambda by: self._message(self._registry.resolve(request.release))
        )
        return operators_pb2.GetReleaseResponse(release=release)

    async def ExplainRelease(
        self, request: operators_pb2.ExplainReleaseRequest, context: Context
    ) -> operators_pb2.ExplainReleaseResponse:
        def explain(by: str) -> operators_pb2.ExplainReleaseResponse:
            with self._journal.read() as state:
                return explain_release(
                    state,
                    self._registry.resolve(request.release),
                    self._presence.of,
                    self._channels,
                )

        return await self._ask(context, explain)

    async def DiffReleases(
        self, request: operators_pb2.DiffReleasesRequest, context: Context
    ) -> operators_pb2.DiffReleasesResponse:
        def diff(by: str) -> operators_pb2.DiffReleasesResponse:
            a, b = (
                self._registry.resolve(request.release_a),
                self._registry.resolve(request.release_b),
            )
            modules = self._registry.difference(a, b)  # reads blobs: not under the journal's lock
            with self._journal.read() as state:
                return diff_releases(state, a, b, modules)

        return await self._ask(context, diff)

    async def PromoteRelease(
        self, request: operators_pb2.PromoteReleaseRequest, context: Context
    ) -> operators_pb2.PromoteReleaseResponse:
        def promote(by: str) -> operators_pb2.Release:
            release = self._registry.resolve(request.release)
            return self._message(self._registry.promote(release.release_id, request.channel, by))

        return operators_pb2.PromoteReleaseResponse(release=await self._ask(context, promote))

    async def RollbackRelease(
        self, request: operators_pb2.RollbackReleaseRequest, context: Context
    ) -> operators_pb2.RollbackReleaseResponse:
        return await self._ask(context, lambda by: self._rollback(request, by))

    async def ListUpdates(
        self, request: operators_pb2.ListUpdatesRequest, context: Context
    ) -> operators_pb2.ListUpdatesResponse:
        def list_updates(by: str) -> list[operators_pb2.Update]:
            with self._journal.read() as state:
                _expect_cohort(state, request.cohort)
                if request.node_id and request.node_id not in state.nodes:
                    raise unknown_node(request.node_id)
                updates = (
                    state.updates_of(request.node_id) if request.node_id else state.updates.values()
                )
                return [
                    update_message(update)
                    for update in updates
                    if request.cohort in ("", update.cohort)
                ]

        updates = await self._ask(context, list_updates)
        return operators_pb2.ListUpdatesResponse(
            updates=updates, standstills=self._standstills(request.cohort)
        )

    async def RequeueUpdates(
        self, request: operators_pb2.RequeueUpdatesRequest, context: Context
    ) -> operators_pb2.RequeueUpdatesResponse:
        updates = await self._ask(
            context, lambda by: requeue(self._journal, self._blobs, request.updates, by)
        )
        return operators_pb2.RequeueUpdatesResponse(updates=map(update_message, updates))

    async def SetAsideUpdates(
        self, request: operators_pb2.SetAsideUpdatesRequest, context: Context
    ) -> operators_pb2.SetAsideUpdatesResponse:
        updates = await self._ask(
            context, lambda by: set_aside(self._journal, request.updates, request.reason, by)
        )
        return operators_pb2.SetAsideUpdatesResponse(updates=map(update_message, updates))

    async def QuarantineNode(
        self, request: operators_pb2.QuarantineNodeRequest, context: Context
    ) -> operators_pb2.QuarantineNodeResponse:
        updates = await self._ask(
            context, lambda by: quarantine_node(self._journal, request.node_id, request.reason, by)
        )
        return operators_pb2.QuarantineNodeResponse(updates=map(update_message, updates))

    async def ReleaseNode(
        self, request: operators_pb2.ReleaseNodeRequest, context: Context
    ) -> operators_pb2.ReleaseNodeResponse:
        updates = await self._ask(
            context, lambda by: release_node(self._journal, request.node_id, by)
        )
        return operators_pb2.ReleaseNodeResponse(updates=map(update_message, updates))

    async def Forget(
        self, request: operators_pb2.ForgetRequest, context: Context
    ) -> operators_pb2.ForgetResponse:
        def forget(by: str) -> operators_pb2.ForgetOrder:
            if request.cancel:
                return self._forget_message(cancel_forget(self._journal, request.target, by))
            work = propose_forget if request.dry_run else order_forget
            return self._forget_message(
                work(self._journal, self._blobs, request.target, request.accept_loss, by)
            )

        return operators_pb2.ForgetResponse(order=await self._ask(context, forget))

    async def ListForgets(
        self, request: operators_pb2.ListForgetsRequest, context: Context
    ) -> operators_pb2.ListForgetsResponse:
        def list_forgets(by: str) -> list[operators_pb2.ForgetOrder]:
            with self._journal.read() as state:
                return [
                    self._forget_message(describe(state, order)) for order in state.forgets.values()
                ]

        return operators_pb2.ListForgetsResponse(orders=await self._ask(context, list_forgets))

    async def CollectBlobs(
        self, request: operators_pb2.CollectBlobsRequest, context: Context
    ) -> operators_pb2.CollectBlobsResponse:
        def collect(by: str) -> Collection:
            return self._collector.collect(by) if request.apply else self._collector.preview()

        found = await self._ask(context, collect)
        return operators_pb2.CollectBlobsResponse(
            blobs=[operators_pb2.CollectedBlob(**vars(blob)) for blob in found.blobs],
            uploads=found.uploads,
            upload_bytes=found.upload_bytes,
            total_bytes=found.size_bytes,
        )

    async def ListEvents(
        self, request: operators_pb2.ListEventsRequest, context: Context
    ) -> operators_pb2.ListEventsResponse:
        limit = request.limit or DEFAULT_EVENTS

        def list_events(by: str) -> list[operators_pb2.JournalEvent]:
            if limit > MAX_EVENTS:
                raise _bad(
                    f"{limit} events were asked for; one call gives at most {MAX_EVENTS}. Page "
                    "with `after`."
                )
            after = min(request.after, MAX_SEQUENCE)
            return [event_message(event) for event in self._journal.events(after, limit)]

        return operators_pb2.ListEventsResponse(events=await self._ask(context, list_events))

    async def _ask(self, context: Context, work: Callable[[str], T]) -> T:
        """Run `work` in a thread with the operator's name; raises Refused for anybody else."""
        return await asyncio.to_thread(work, self._authenticator.operator(context))

    def _nodes(self) -> list[NodeRecord]:
        with self._journal.read() as state:
            return list(state.nodes.values())

    def _forget_message(self, proposal: Proposal) -> operators_pb2.ForgetOrder:
        with self._journal.read() as state:
            return forget_message(state, proposal, self._failure(proposal.order.cohort))

    def _standstills(self, cohort: str) -> list[operators_pb2.Standstill]:
        """What stands still, of one cohort or (empty) of all; uploads concern every cohort."""
        with self._journal.read() as state:
            cohorts = [name for name in state.cohorts() if cohort in ("", name)]
        reasons = [(name, self._failure(name)) for name in cohorts] + [("", self._shortage())]
        return [
            operators_pb2.Standstill(cohort=name, reason=reason)
            for name, reason in reasons
            if reason
        ]

    def _message(self, release: ReleaseRecord) -> operators_pb2.Release:
        with self._journal.read() as state:
            known = state.releases[release.release_id]
            return release_message(state, known, self._channels, figures_of(state, known))

    def _rollback(
        self, request: operators_pb2.RollbackReleaseRequest, by: str
    ) -> operators_pb2.RollbackReleaseResponse:
        choice = _CHOICES.get(request.updates)
        if choice is None:
            raise _bad(
                "The request does not say what happens to the abandoned releases' updates. "
                "Expected requeue or set_aside."
            )
        target = (
            self._registry.resolve(request.release, request.cohort).release_id
            if request.release
            else None
        )
        done = self._registry.rollback(
            request.cohort, target, choice, by, request.channel or "stable"
        )
        with self._journal.read() as state:
            freed = [
                u
                for release_id in done.abandoned
                for u in state.releases[release_id].manifest.updates
            ]
            return operators_pb2.RollbackReleaseResponse(
                release=release_message(state, done.release, self._channels),
                abandoned_release_ids=done.abandoned,
                updates=[update_message(state.updates[update_id]) for update_id in freed],
            )


def _expect_cohort(state: State, cohort: str) -> None:
    if cohort and cohort not in state.cohorts():
        raise unknown_cohort(state, cohort)


def _bad(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, message)
