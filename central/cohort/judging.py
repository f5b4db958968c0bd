"""Whether a candidate's look is over, and what its verdict is.

In: an undecided plan with a candidate; offers and reports in the journal. Out: an offer of the next
look, or a verdict with what follows from it, in one transaction. Guarantees: a look is an offer in
the journal before any node hears of it, and nothing is held between steps, so `kill -9` at any
point resumes the same look.

    current look -> offered, unless it stands -> wait until it is over
                 -> gate -> verdict, or the next look is offered
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from central.cohort.looks import (
    Ask,
    count_results,
    current_look,
    evidence,
    has_quorum,
    is_result,
    missing,
    next_look,
    offers_of,
    reports_of_look,
    unjudged,
)
from central.cohort.offers import CohortGrid
from central.cohort.patience import Patience
from central.cohort.planning import least_updates, parse_time
from central.fleet.quarantine import quarantine_events
from central.gate import Gate, Verdict
from central.journal import (
    EvaluationRecord,
    EventKind,
    Journal,
    NewEvent,
    PlanRecord,
    State,
)
from central.releases.canary import promotion
from central.settings import CentralSettings

log = logging.getLogger(__name__)


class Judge:
    """One per cohort's loop."""

    def __init__(
        self, cohort: str, journal: Journal, settings: CentralSettings, grid: CohortGrid
    ) -> None:
        gate = settings.gate
        self._cohort = cohort
        self._journal = journal
        self._grid = grid
        self._settings = gate
        self._quarantine = settings.quarantine
        self._channel = settings.channels.policy(cohort).first
        self._patience = Patience(gate, grid.is_connected, grid.clock)
        self._gate = Gate(
            gate.alpha,
            gate.tolerance_points,
            gate.anchor_tolerance_points,
            gate.environments,
            gate.margin_points,
            max(gate.tasks, gate.max_tasks),
            gate.likelihood_tolerance_nats,
            gate.likelihood_margin_nats,
        )

    def step(self, planned: PlanRecord, candidate: str) -> None:
        """Take the candidate one look further; returns early when stopped."""
        if self._ends(self._without_nodes, planned, candidate):
            return
        if self._hear(planned, candidate):
            self._ends(self._decide, planned, candidate)

    def _ends(
        self,
        decide: Callable[[State, PlanRecord, str], Verdict | None],
        planned: PlanRecord,
        candidate: str,
    ) -> bool:
        """Record the verdict that `decide` comes to, if it comes to one.

        No node is revoked between the two, and no node joins.
        """
        with self._journal.read() as state:
            verdict = decide(state, planned, candidate)
            if verdict is not None:
                self._record(state, planned, candidate, verdict)
        return verdict is not None

    def _without_nodes(self, state: State, planned: PlanRecord, candidate: str) -> Verdict | None:
        """The verdict when nobody is to be asked; None when nodes are, now or later."""
        if self._settings.quorum == 0:
            return Verdict(True, "accepted without evaluation: CENTRAL_GATE__QUORUM is 0.", {}, {})
        alone = not state.members(self._cohort)
        return self._without_quorum(state, planned, candidate) if alone else None

    def _without_quorum(self, state: State, planned: PlanRecord, candidate: str) -> Verdict | None:
        """Too few results end a removal whose loss an operator accepts; others wait for more."""
        if not _loss_accepted_by(state, planned):
            return None
        results = count_results(state, candidate)
        return Verdict(
            False,
            f"had {results} results and needs {self._settings.quorum} (CENTRAL_GATE__QUORUM).",
            {},
            {},
        )

    # A look.

    def _hear(self, planned: PlanRecord, candidate: str) -> bool:
        """Offer the candidate's current look and wait until it is over.

        False: stopped, or the candidate was decided elsewhere before it was offered.
        """
        offer_id = self._grid.wait(lambda state: self._offer_current(state, planned, candidate))
        if not offer_id or not self._grid.wait(
            lambda state: self._is_over(state, state.evaluations[offer_id])
        ):
            return False
        with self._journal.read() as state:
            self._record_silent(state, state.evaluations[offer_id])
        return True

    def _offer_current(self, state: State, planned: PlanRecord, candidate: str) -> str | None:
        """The offer of the candidate's current look; "" when it was decided elsewhere.

        None: the cohort has no node yet that is not revoked.
        """
        if state.releases[candidate].state != "candidate":
            return ""
        if not state.members(self._cohort):
            return None
        ask = current_look(state, candidate, planned.plan.parent, self._settings)
        return self._offer(state, ask)

    def _offer(self, state: State, ask: Ask) -> str:
        """The look's standing offer, or a new one where that can bring nothing more."""
        earlier = offers_of(state, ask.candidate, ask.look)
        if earlier and not (why := self._why_again(state, earlier)):
            return earlier[-1].offer_id
        if earlier:
            log.warning(
                f"{why}, evaluation offered again",
                extra={
                    "cohort": self._cohort,
                    "candidate": ask.candidate,
                    "offers": len(earlier),
                },
            )
        reports = reports_of_look(state, earlier)
        answered = {node for node, report in reports.items() if is_result(report)}
        asked = state.members(self._cohort) if ask.nodes is None else ask.nodes
        now = parse_time(self._grid.clock())
        deadline = now + timedelta(seconds=self._patience.deadline_s(ask.tasks))
        return self._grid.offer_evaluation(
            {
                **ask.to_body(),
                "deadline_at": deadline.isoformat(timespec="microseconds").replace("+00:00", "Z"),
                "nodes": [
                    node
                    for node in state.members(self._cohort)
                    if node in asked and node not in answered
                ],
            }
        )

    def _why_again(self, state: State, offers: list[EvaluationRecord]) -> str:
        """Why a look is offered again; empty while its last offer stands."""
        last = offers[-1]
        ended_before = parse_time(last.deadline_at) <= self._patience.started
        if ended_before and missing(state, offers):
            return "central was away"
        # Only the first look has a quorum to meet: what a later one lacks, the verdict does
        # without.
        if last.look == 1 and self._patience.expired(last):
            return "" if self._has_quorum(state, last.candidate) else "quorum not met"
        return ""

    def _is_over(self, state: State, offer: EvaluationRecord) -> bool:
        """Whether nobody is waited for any longer at the look of this offer."""
        if state.releases[offer.candidate].state != "candidate" or self._patience.expired(offer):
            return True
        offers = offers_of(state, offer.candidate, offer.look)
        if any(self._patience.waits_for(state, node, offer) for node in missing(state, offers)):
            return False
        return offer.look > 1 or self._has_quorum(state, offer.candidate)

    def _has_quorum(self, state: State, candidate: str) -> bool:
        return has_quorum(state, candidate, self._settings.quorum)

    def _record_silent(self, state: State, offer: EvaluationRecord) -> None:
        """Take note of who held up the look without a result: next time nobody waits for it."""
        asked = [node for node in state.members(self._cohort) if node in offer.nodes]
        for node in [node for node in asked if self._patience.held_up(state, node, offer)]:
            self._journal.append(
                NewEvent(EventKind.NODE_SILENT, self._cohort, node, {"offer_id": offer.offer_id})
            )
            log.warning(
                "evaluation held up without a result",
                extra={"cohort": self._cohort, "node_id": node},
            )

    # The verdict.

    def _decide(self, state: State, planned: PlanRecord, candidate: str) -> Verdict | None:
        """The verdict on the looks so far.

        None: too few results, a further look is offered, or the candidate was decided elsewhere.
        """
        if state.releases[candidate].state != "candidate":
            return None
        if not self._has_quorum(state, candidate):
            # None: the next step offers the first look again.
            return self._without_quorum(state, planned, candidate)
        found = self._gate.look(*evidence(state, candidate))
        verdict = self._gate.verdict(found)
        if verdict is not None:
            gaps = [
                f" Nobody judged {', '.join(names)}: no result of {node}."
                for node, names in unjudged(state, candidate, found).items()
            ]
            return replace(verdict, text=verdict.text + "".join(gaps))
        further = next_look(state, candidate, found, self._settings)
        self._offer(state, further)
        log.info(
            "undecided, asking more tasks",
            extra={
                "release": candidate,
                "look": further.look,
                "environments": sorted(further.suites),
            },
        )
        return None

    def _record(self, state: State, planned: PlanRecord, candidate: str, verdict: Verdict) -> None:
        # One transaction. A rollback meanwhile has cancelled the plan, and the journal then refuses
        # the verdict.
        release = state.releases[candidate]
        by = "" if verdict.accepted else _loss_accepted_by(state, planned)
        if by:
            text = f"accepted by {by} in spite of the gate, which {verdict.text}"
            verdict = replace(verdict, accepted=True, text=text)
        isolate = not verdict.accepted and self._can_isolate(state, planned)
        body = {**vars(verdict), "isolate": isolate, **({"loss_accepted_by": by} if by else {})}
        events = [NewEvent(EventKind.VERDICT, self._cohort, candidate, body)]
        if verdict.accepted:
            events.append(promotion(state, release, self._channel, by or "gate"))
        elif len(release.manifest.updates) == 1:
            events += quarantine_events(state, release.manifest.updates, self._quarantine)
        self._journal.append(*events)
        log.info(
            "verdict",
            extra={
                "cohort": self._cohort,
                "release": candidate,
                "accepted": verdict.accepted,
                "isolate": isolate,
                "text": verdict.text,
            },
        )

    def _can_isolate(self, state: State, planned: PlanRecord) -> bool:
        """Whether parts of the rejected candidate are tried next; else its updates are set aside.

        A strategy that needs several updates cannot try fewer.
        """
        isolation = state.isolations.get(self._cohort)
        tries = isolation.tries if isolation else 0
        plan = planned.plan
        half = len(plan.updates) // 2
        enough = half >= least_updates(plan.strategy, plan.strategy_options)
        return enough and tries < self._settings.isolation_tries


def _loss_accepted_by(state: State, planned: PlanRecord) -> str:
    """The operator who ordered the removal and accepts a loss of skill for it; else empty."""
    removal = planned.plan.removal
    order = state.forgets[removal.order] if removal else None
    return order.by if order and order.accept_loss else ""
