"""The loop of one cohort as a Flower ServerApp: wait for a plan; build it, or judge it.

In: admitted updates and evaluation reports, from the journal. Out: candidates in the registry,
verdicts and promotions in the journal. Guarantees: every step is in the journal before the next
begins, and is taken from the journal's state. So after `kill -9` at any point the loop goes on
where it was: a plan without a candidate is merged again to the same bytes, a candidate without an
offer is offered, an offer without a verdict is waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid, ServerApp

from central.blobs import BlobStore
from central.cohort.building import Builder
from central.cohort.errors import UnusableUpdate
from central.cohort.judging import Judge
from central.cohort.offers import CohortGrid, JournalGrid
from central.cohort.planning import Planner, set_aside
from central.cohort.screening import screen_of
from central.cohort.soaking import SoakWatch
from central.cohort.strategies.flower import check_strategy
from central.journal import Journal, JournalConflict, MergePlan, PlanRecord, State
from central.releases import Registry
from central.settings import CentralSettings

log = logging.getLogger(__name__)


def run_cohort(
    cohort: str,
    journal: Journal,
    registry: Registry,
    blobs: BlobStore,
    settings: CentralSettings,
    stop: threading.Event,
    is_connected: Callable[[str], bool] = lambda node_id: True,
    clock: Callable[[], str] | None = None,
    went_on: Callable[[], None] = lambda: None,
) -> None:
    """Run the cohort's loop in this thread until `stop` is set.

    It sees `stop` within a second, or at the end of a merge.

    `went_on` is called whenever the loop has nothing to do but wait. Raises SettingsError for a
    strategy that cannot work, StrategyFailed when it makes nothing of a plan whatever the updates,
    StorageError when journal or blobs fail.
    """
    policy = settings.merge.policy(cohort)
    check_strategy(policy.strategy, policy.strategy_options, policy.min_updates)
    registry.ensure_cohort(cohort)
    grid = JournalGrid(cohort, journal, stop, is_connected, clock, went_on)
    context = Context(
        run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={"cohort": cohort}
    )
    loop_on = partial(CohortLoop, cohort, journal, registry, blobs, settings)
    make_server_app(loop_on, stop)(grid, context)


def make_server_app(
    loop_on: Callable[[CohortGrid], CohortLoop], stop: threading.Event
) -> ServerApp:
    """The app that takes a loop's steps on its grid until `stop` is set."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        loop = loop_on(grid)
        while not stop.is_set():
            loop.step()

    return app


class CohortLoop:
    """One merge after the other; holds nothing between steps that is not in the journal."""

    def __init__(
        self,
        cohort: str,
        journal: Journal,
        registry: Registry,
        blobs: BlobStore,
        settings: CentralSettings,
        grid: CohortGrid,
    ) -> None:
        policy = settings.merge.policy(cohort)
        channels = settings.channels.policy(cohort)
        screen = screen_of(policy, blobs)
        self._cohort = cohort
        self._journal = journal
        self._grid = grid
        self._max_rank = settings.limits.max_rank
        self._soak = SoakWatch(cohort, journal, channels, grid.is_connected, grid.clock)
        self._planner = Planner(cohort, journal, policy, screen, grid.clock)
        self._builder = Builder(journal, registry, blobs, policy)
        self._judge = Judge(cohort, journal, settings, grid)

    def step(self) -> None:
        """Wait for a plan; build it if it has no candidate, else judge it. Ends when stopped."""
        planned = self._wait_for_plan()
        if planned is None:
            return
        try:
            if planned.candidate is None:
                self._builder.build(planned, self._grid)
            else:
                self._judge_candidate(planned, planned.candidate)
        except JournalConflict as error:
            # A rollback or an operator's decision cancelled the plan meanwhile; the state says what
            # is next.
            log.warning(
                "merge overtaken",
                extra={"cohort": self._cohort, "plan": planned.plan_id, "reason": str(error)},
            )

    def _wait_for_plan(self) -> PlanRecord | None:
        """The cohort's plan without a verdict; None when stopped."""
        self._grid.offer_training(self._max_rank)
        while True:
            found = self._grid.wait(self._next_plan)
            if not isinstance(found, MergePlan):
                return found
            self._planner.screen(found)  # a draft

    def _next_plan(self, state: State) -> PlanRecord | MergePlan | None:
        under_way = self._planner.under_way(state)
        if under_way is not None:
            return under_way
        self._soak.look(state)  # while a canary is ahead of stable, nothing is planned
        return self._planner.plan(state)

    def _judge_candidate(self, planned: PlanRecord, candidate: str) -> None:
        try:
            self._builder.mend(candidate)
        except UnusableUpdate as error:
            # The candidate is given up; its other updates are merged anew.
            set_aside(self._journal, self._cohort, error)
            return
        self._judge.step(planned, candidate)
