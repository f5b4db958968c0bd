"""From a candidate to its verdict: offer a look, wait for its reports, ask the gate, look again or decide.

In: an undecided plan with a candidate. Out: a verdict, or None when the next step has to go on. Guarantees: a look is an offer
in the journal before any node hears of it; nothing is held between steps, so `kill -9` at any point resumes the same look.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from flwr.app import ArrayRecord, ConfigRecord

from central.evaluation import Gate, Verdict
from central.federation.grid import JournalGrid
from central.federation.looks import Ask, count_results, current_look, evidence, has_quorum, next_look, unjudged
from central.federation.strategy import ProductMean
from central.journal import Journal, PlanRecord, State
from central.settings import GateSettings

log = logging.getLogger(__name__)


class Deciding:
    """One per cohort's loop."""

    def __init__(self, journal: Journal, settings: GateSettings) -> None:
        self._journal = journal
        self._settings = settings
        self._gate = Gate(
            settings.alpha,
            settings.tolerance_points,
            settings.anchor_tolerance_points,
            settings.environments,
            settings.margin_points,
            max(settings.tasks, settings.max_tasks),
        )

    def decide(self, strategy: ProductMean, planned: PlanRecord, candidate: str, grid: JournalGrid) -> Verdict | None:
        """Take the candidate one look further; None: stopped, too few results, or a further look was offered."""
        if self._settings.quorum == 0:
            return Verdict(True, "accepted without evaluation: CENTRAL_GATE__QUORUM is 0.", {}, {})
        with self._journal.read() as state:
            alone = not state.members(planned.plan.cohort)
            if alone and (verdict := self._without_quorum(state, planned, candidate)) is not None:
                return verdict
        if not grid.wait_for_node(candidate):
            return None
        with self._journal.read() as state:
            ask = current_look(state, candidate, planned.plan.parent, self._settings)
        replies = list(grid.pull_messages(self._offer(strategy, planned, ask, grid)))
        if grid.stopped:
            return None
        log.info(
            "look complete",
            extra={
                "release": candidate,
                "look": ask.look,
                "pass_rates": dict(strategy.aggregate_evaluate(planned.plan.version, replies) or {}),
                "abstained": [reply.error.reason for reply in replies if reply.has_error()],
            },
        )
        with self._journal.read() as state:
            if state.releases[candidate].state != "candidate":
                return None  # decided elsewhere, for example by a rollback of its parent
            if not has_quorum(state, candidate, self._settings.quorum):
                # None: the next step offers the first look again, and the grid logs it.
                return self._without_quorum(state, planned, candidate)
            found = self._gate.look(*evidence(state, candidate))
            verdict = self._gate.verdict(found)
            if verdict is not None:
                left = unjudged(state, candidate, found)
                gaps = [f" Nobody judged {', '.join(names)}: no result of {node}." for node, names in left.items()]
                verdict = replace(verdict, text=verdict.text + "".join(gaps))
            further = None if verdict else next_look(state, candidate, found, self._settings)
        if further is not None:
            self._offer(strategy, planned, further, grid)
            log.info(
                "undecided, asking more tasks",
                extra={"release": candidate, "look": further.look, "environments": sorted(further.suites)},
            )
        return verdict

    def _without_quorum(self, state: State, planned: PlanRecord, candidate: str) -> Verdict | None:
        """Too few results: of a removal whose loss an operator accepts that is the end (server_app.py), of all else it is none."""
        removal = planned.plan.removal
        if removal is None or not state.forgets[removal.order].accept_loss:
            return None
        results = count_results(state, candidate)
        return Verdict(
            False, f"had {results} results and needs {self._settings.quorum} (CENTRAL_GATE__QUORUM).", {}, {}
        )

    def _offer(self, strategy: ProductMean, planned: PlanRecord, ask: Ask, grid: JournalGrid) -> list[str]:
        config = ConfigRecord({"look": ask.to_json()})
        messages = strategy.configure_evaluate(planned.plan.version, ArrayRecord(), config, grid)
        return list(grid.push_messages(messages))
