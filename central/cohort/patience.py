"""How long a look waits for a node, and for which nodes the next candidate's look does not wait.

In: offers and reports, which nodes are connected, the clock. Out: yes or no. Guarantee: what a
report says of the candidate never enters. Only when it came, and whether it has a result, does.
Earlier candidates settled which nodes are silent. So doing without a node chooses no result.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from central.cohort.looks import is_result, offers_of
from central.cohort.planning import parse_time
from central.journal import EvaluationRecord, EvaluationReport, State
from central.settings import GateSettings


class Patience:
    """One per grid. `started`: since when central is there to take reports."""

    def __init__(
        self, gate: GateSettings, is_connected: Callable[[str], bool], clock: Callable[[], str]
    ) -> None:
        self.started = parse_time(clock())
        self._gate = gate
        self._is_connected = is_connected
        self._clock = clock

    def deadline_s(self, tasks: int) -> float:
        """Seconds that a look of so many tasks has at most."""
        return self._gate.deadline_s * max(1.0, tasks / self._gate.tasks)

    def expired(self, offer: EvaluationRecord) -> bool:
        """Whether the offer's deadline has passed."""
        return parse_time(self._clock()) >= parse_time(offer.deadline_at)

    def waits_for(self, state: State, node_id: str, offer: EvaluationRecord) -> bool:
        """Whether the look still waits for this node.

        - The first look does not wait for a silent node.
        - A node that is away has the grace to come back. A restart of central begins it anew.
        - The first look waits for a connected node until the deadline.
        - The deadline of a later look may be hours away. There a connected node has the grace and
          twice the longest time: that of the slowest reporter, or the node's own for as many tasks
          at an earlier look. So a node that hangs holds up nobody.
        """
        if offer.look == 1 and state.nodes[node_id].silent_since:
            return False
        now, grace = parse_time(self._clock()), timedelta(seconds=self._gate.absent_grace_s)
        if now < max(self._offered(offer), self.started) + grace:
            return True
        if not self._is_connected(node_id):
            return False
        return (
            offer.look == 1
            or now < self._offered(offer) + 2 * self._longest(state, node_id, offer) + grace
        )

    def held_up(self, state: State, node_id: str, offer: EvaluationRecord) -> bool:
        """Whether the first look waited for this node past the grace, and got no result from it.

        A node that is away costs the grace only, so it held up nothing. Nor did any node while
        central itself was away. An abstention is no result: the node's own patience may have ended.
        """
        report = offer.reports.get(node_id)
        if (
            offer.look > 1
            or self.started > self._offered(offer)
            or state.nodes[node_id].silent_since
        ):
            return False
        if report is None and not (self.expired(offer) and self._is_connected(node_id)):
            return False
        if report is not None and is_result(report):
            return False
        waited = (
            self._took(offer, report)
            if report
            else parse_time(self._clock()) - self._offered(offer)
        )
        results = [self._took(offer, other) for other in offer.reports.values() if is_result(other)]
        return waited > max(results, default=timedelta()) + timedelta(
            seconds=self._gate.absent_grace_s
        )

    def _longest(self, state: State, node_id: str, offer: EvaluationRecord) -> timedelta:
        """The longer of two: the slowest reporter's time, and the node's own at an earlier look.

        The node's own is scaled to the offer's number of tasks.
        """
        took = [self._took(offer, report) for report in offer.reports.values()]
        took += [
            self._took(earlier, earlier.reports[node_id]) * (offer.tasks / earlier.tasks)
            for earlier in offers_of(state, offer.candidate)
            if earlier.look < offer.look and node_id in earlier.reports
        ]
        return max(took, default=timedelta())

    def _took(self, offer: EvaluationRecord, report: EvaluationReport) -> timedelta:
        return max(parse_time(report.at) - self._offered(offer), timedelta())

    def _offered(self, offer: EvaluationRecord) -> datetime:
        return parse_time(offer.deadline_at) - timedelta(seconds=self.deadline_s(offer.tasks))
