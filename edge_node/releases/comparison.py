"""One evaluation offer: which environments, against which releases, on which tasks.

In: an offer of central. Out: results, one per environment asked for. Environments with the same
reference are measured one after the other: beside the candidate one reference at a time takes an
adapter slot. A reference that cannot be had here is replaced by the offer's own (the candidate's
parent), and the result says why. An environment that fails costs its own result only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from itertools import groupby

import grpc

from edge_node.errors import AdapterError, EnvironmentFault, NothingToMeasure, ServingError
from edge_node.releases.evaluation import Evaluator, Sampling
from edge_node.releases.trouble import words
from protos.fleet.v1 import fleet_pb2
from protos.manifest import sha256_hex
from protos.releases.v1 import releases_pb2

log = logging.getLogger(__name__)

TRANSIENT = (ServingError, grpc.aio.AioRpcError, OSError)
"""Troubles that a new try may not meet again."""
Signed = releases_pb2.SignedManifest


class Comparison:
    """Runs offers, one at a time."""

    def __init__(
        self,
        evaluator: Evaluator,
        obtain: Callable[[Signed], Awaitable[str]],
        hold: Callable[[tuple[str, ...]], None],
    ) -> None:
        """obtain: loads a release into vLLM, gives its served name. hold: which must stay there."""
        self._evaluator = evaluator
        self._obtain = obtain
        self._hold = hold
        self.measured: set[str] = set()
        self.faults: dict[str, EnvironmentFault] = {}
        """Of environments that did not work."""

    async def run(
        self, offer: fleet_pb2.EvaluationOffer, *, last_try: bool
    ) -> list[releases_pb2.EnvironmentResult]:
        """Results for every environment of this node that the offer asks for and that works.

        Raises:
            NothingToMeasure: no environment of this node is asked for.
            EnvironmentFault: none of them works.
            AdapterError: the candidate or its parent is not usable here.
            ServingError, grpc.aio.AioRpcError, OSError: may be over at the next try. With
                `last_try` a reference that raises one is replaced instead.
        """
        suites = sorted(
            _suites(offer, sorted(self._evaluator.environments)),
            key=lambda suite: suite.reference_id,
        )
        if not suites:
            raise NothingToMeasure(
                "This node has no environment that the evaluation asks for. Set EDGE_ENVIRONMENTS."
            )
        known = {_release_id(signed): signed for signed in (offer.reference, *offer.references)}
        sampling = Sampling(max(1, offer.attempts), offer.temperature)
        results = []
        for reference_id, group in groupby(suites, key=lambda suite: suite.reference_id):
            signed = known.get(reference_id or _release_id(offer.reference))
            self._hold((_release_id(offer.candidate), reference_id, _release_id(offer.reference)))
            candidate = await self._obtain(offer.candidate)
            reference, fallback = await self._reference(signed, offer.reference, last_try)
            for suite in group:
                name = suite.environment
                try:
                    result = await self._evaluator.compare(
                        name, candidate, reference, suite.first_task, suite.tasks, sampling
                    )
                except EnvironmentFault as fault:
                    log.warning("not evaluated", extra={"environment": name, "why": words(fault)})
                    self.faults[name] = fault
                    continue
                self.measured.add(name)
                result.reference_id = (
                    _release_id(offer.reference) if fallback or not reference_id else reference_id
                )
                result.fallback_reason = fallback
                results.append(result)
        if not results:
            raise next(iter(self.faults.values()))
        return results

    async def _reference(
        self, signed: Signed | None, instead: Signed, last_try: bool
    ) -> tuple[str, str]:
        """Served name of the reference, and why it is `instead`."""
        if signed == instead:
            return await self._obtain(instead), ""
        try:
            if signed is None:
                raise AdapterError("The offer names a reference that it does not carry.")
            return await self._obtain(signed), ""
        except (AdapterError, *TRANSIENT) as error:
            gone = (
                isinstance(error, grpc.aio.AioRpcError)
                and error.code() == grpc.StatusCode.NOT_FOUND
            )
            if not (gone or last_try or isinstance(error, AdapterError)):
                raise
            log.warning(
                "high-water release not loaded; the parent takes its place",
                extra={"why": words(error)},
            )
            return await self._obtain(instead), words(error)


def _suites(
    offer: fleet_pb2.EvaluationOffer, environments: list[str]
) -> Iterator[fleet_pb2.EnvironmentSuite]:
    """What the offer asks of each of this node's environments."""
    asked = {suite.environment: suite for suite in offer.suites}
    for name in environments:
        if name in asked or not offer.only_suites:
            suite = asked.get(name, fleet_pb2.EnvironmentSuite())
            yield fleet_pb2.EnvironmentSuite(
                environment=name,
                reference_id=suite.reference_id,
                first_task=suite.first_task,
                tasks=suite.tasks or offer.tasks,
            )


def _release_id(signed: Signed) -> str:
    return sha256_hex(signed.manifest)
