"""Central's evaluation offers: evaluated one at a time, answered with counts or with a reason.

In: offers of FleetService.Watch. Out: ReleaseService.ReportEvaluation. Whatever an environment or
vLLM does, the answer is sent: a trouble that may pass is tried again, then the node abstains and
reports a problem. While an offer is evaluated, its releases are in `in_use`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable

import grpc

from edge_node.errors import EnvironmentFault, NothingToMeasure
from edge_node.problems import Problems
from edge_node.releases.comparison import TRANSIENT, Comparison
from edge_node.releases.evaluation import Evaluator
from edge_node.releases.trouble import (
    RETRY_FIRST_S,
    RETRY_LAST_S,
    UNREACHABLE,
    next_step,
    words,
)
from edge_node.settings import EdgeSettings
from lorikeet.pauses import doubling
from protos.fleet.v1 import fleet_pb2
from protos.releases.v1 import releases_pb2, releases_pb2_grpc

log = logging.getLogger(__name__)

EVALUATION_TRIES = 3
KNOWN_OFFERS = 1000
_REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.NOT_FOUND,
)
_TOO_LATE = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, *UNREACHABLE)
"""Nobody waits for the result any more, or nobody can be told: no fault of the evaluation."""

Report = releases_pb2.ReportEvaluationRequest


class OfferedEvaluations:
    """Long-lived: `run()` until cancelled; `add` gives it work."""

    def __init__(
        self,
        settings: EdgeSettings,
        channel: grpc.aio.Channel,
        vllm_ready: Callable[[], Awaitable[object]],
        evaluator: Evaluator,
        obtain: Callable[[releases_pb2.SignedManifest], Awaitable[str]],
        changed: Callable[[], None],
    ) -> None:
        """`obtain` loads a release and gives its served name; `changed` tells of `in_use`."""
        self._call_timeout_s = settings.central.call_timeout_s
        self._vllm_ready = vllm_ready
        self._evaluator = evaluator
        self._obtain = obtain
        self._changed = changed
        self._releases = releases_pb2_grpc.ReleaseServiceStub(channel)
        self._waiting: asyncio.Queue[tuple[fleet_pb2.EvaluationOffer, float]] = asyncio.Queue()
        """With the time of the event loop at which central stops waiting."""
        self._known: deque[str] = deque(maxlen=KNOWN_OFFERS)
        self._problems = Problems(settings.data_dir)
        self._faults: dict[str, EnvironmentFault] = {}
        """Of each environment that did not work when it was last asked."""
        self.in_use: tuple[str, ...] = ()
        """Ids of the releases that are evaluated now."""

    def add(self, offer: fleet_pb2.EvaluationOffer) -> None:
        """A new watch brings every open offer again; each is evaluated once."""
        if offer.offer_id not in self._known:
            self._known.append(offer.offer_id)
            ends = asyncio.get_running_loop().time() + offer.deadline_s
            self._waiting.put_nowait((offer, ends))

    async def run(self) -> None:
        while True:
            offer, ends = await self._waiting.get()
            # Central did not wait for this node: the older ones are decided.
            while not self._waiting.empty():
                offer, ends = self._waiting.get_nowait()
            try:
                async with asyncio.timeout_at(ends):
                    report = await self._compare_with_retries(offer)
            except Exception as error:  # supervision: whatever breaks, this node abstains
                in_time = asyncio.get_running_loop().time() < ends
                report = self._abstain(offer, error, in_time=in_time)
            finally:
                self.in_use = ()
            if await self._send_report(report, ends) and not report.abstain_reason:
                self._problems.clear("evaluation")
            self._report_faults()
            self._changed()

    def _abstain(
        self, offer: fleet_pb2.EvaluationOffer, error: Exception, *, in_time: bool
    ) -> Report:
        why, then = words(error), next_step(error)
        if isinstance(error, TimeoutError) and not in_time:
            why = f"it took longer than the {offer.deadline_s} s that central waits"
            then = (
                "Ask the operator of central for more time or fewer tasks, "
                "or give this node more compute."
            )
        log.warning("evaluation failed", extra={"offer": offer.offer_id, "why": why})
        if not isinstance(error, NothingToMeasure | EnvironmentFault):
            text = f"This node abstained from the last evaluation: {why}"
            self._problems.report("evaluation", text, then)
        return Report(offer_id=offer.offer_id, abstain_reason=why)

    async def _compare_with_retries(self, offer: fleet_pb2.EvaluationOffer) -> Report:
        """A vLLM that died or a link that broke costs a new start, not a result."""
        for _ in range(EVALUATION_TRIES - 1):
            try:
                return await self._compare(offer, last_try=False)
            except TRANSIENT as error:
                fields = {"offer": offer.offer_id, "why": words(error)}
                log.warning("evaluation starts again", extra=fields)
                await asyncio.sleep(RETRY_FIRST_S)
        return await self._compare(offer, last_try=True)

    async def _compare(self, offer: fleet_pb2.EvaluationOffer, *, last_try: bool) -> Report:
        await self._vllm_ready()
        comparison = Comparison(self._evaluator, self._obtain, self._hold)
        try:
            results = await comparison.run(offer, last_try=last_try)
        finally:
            for name in comparison.measured:
                self._faults.pop(name, None)
            self._faults |= comparison.faults
        return Report(offer_id=offer.offer_id, results=results)

    def _report_faults(self) -> None:
        if not self._faults:
            self._problems.clear("environments")
            return
        text = " ".join(words(fault) for _, fault in sorted(self._faults.items()))
        first = self._faults[min(self._faults)]
        self._problems.report("environments", f"Not evaluated: {text}", next_step(first))

    def _hold(self, release_ids: tuple[str, ...]) -> None:
        """These are evaluated now; others may go when they are beyond what is kept."""
        self.in_use = release_ids
        self._changed()

    async def _send_report(self, report: Report, ends: float) -> bool:
        """False when central refuses it as wrong; one that comes too late is nobody's fault."""
        pauses = doubling(RETRY_FIRST_S, RETRY_LAST_S)
        while True:
            try:
                await self._releases.ReportEvaluation(report, timeout=self._call_timeout_s)
                return True
            except grpc.aio.AioRpcError as error:
                # Refused, for example because the verdict is there already; or nobody waits.
                if error.code() in _REFUSALS or asyncio.get_running_loop().time() > ends:
                    return self._not_reported(report, error)
            await asyncio.sleep(next(pauses))

    def _not_reported(self, report: Report, error: grpc.aio.AioRpcError) -> bool:
        """True when it came too late."""
        fields = {"offer": report.offer_id, "why": words(error)}
        log.warning("evaluation not reported", extra=fields)
        if error.code() in _TOO_LATE:
            return True
        text = f"Central did not take the last evaluation's result: {words(error)}"
        self._problems.report("evaluation", text, next_step(error))
        return False
