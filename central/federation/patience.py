"""How long a look waits for a node that has not reported, and for whom the next candidate's look does not wait.

In: offers and reports, which nodes are connected, the clock. Out: yes or no. Guarantee: nothing that a report says of the candidate
enters, only when it came and whether it has a result; who is silent was settled by candidates before. So doing without a node is
no choice among results.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from central.federation.looks import is_result, offers_of
from central.federation.planning import parse_time
from central.journal import EvaluationRecord, EvaluationReport, State
from central.settings import GateSettings


class Patience:
    """One per grid. `started`: since when central is there to take reports."""

    def __init__(self, gate: GateSettings, is_connected: Callable[[str], bool], clock: Callable[[], str]) -> None:
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
        """Whether the look waits for this node any longer.

        Not at the first look for one that is silent. A node that is away gets the grace to come back, counted anew after a restart of
        central. At a later look, whose deadline may be hours away, one that is connected gets as long again as the slowest reporter
        took, or as it took itself for as many tasks at a look before, and the grace: one that hangs holds up nobody.
        """
        if offer.look == 1 and state.nodes[node_id].silent_since:
            return False
        now, grace = parse_time(self._clock()), timedelta(seconds=self._gate.absent_grace_s)
        if now < max(self._offered(offer), self.started) + grace:
            return True
        if not self._is_connected(node_id):
            return False
        return offer.look == 1 or now < self._offered(offer) + 2 * self._longest(state, node_id, offer) + grace

    def held_up(self, state: State, node_id: str, offer: EvaluationRecord) -> bool:
        """Whether the first look waited for the node longer than the grace after the last result, and got none from it.

        Not one that is away, which costs the grace only, and not when central was away itself. An abstention may be no more than the
        end of the node's own patience.
        """
        report = offer.reports.get(node_id)
        if offer.look > 1 or self.started > self._offered(offer) or state.nodes[node_id].silent_since:
            return False
        if report is None and not (self.expired(offer) and self._is_connected(node_id)):
            return False
        if report is not None and is_result(report):
            return False
        waited = self._took(offer, report) if report else parse_time(self._clock()) - self._offered(offer)
        results = [self._took(offer, other) for other in offer.reports.values() if is_result(other)]
        return waited > max(results, default=timedelta()) + timedelta(seconds=self._gate.absent_grace_s)

    def _longest(self, state: State, node_id: str, offer: EvaluationRecord) -> timedelta:
        """What the slowest reporter of the offer took, or the node itself for as many tasks at an earlier look."""
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
