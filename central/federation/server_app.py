"""The continual loop of one cohort as a Flower ServerApp: offer, wait, plan, merge, evaluate, decide, again.

In: admitted updates and evaluation reports, through a JournalGrid. Out: candidates in the registry, verdicts and
promotions in the journal. Guarantees: every step is in the journal before the next begins, and every step is taken
from the journal's state; so after `kill -9` at any point the loop goes on where it was: a plan without a candidate is
merged again to the same bytes, a candidate without an offer is offered, an offer without a verdict is waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from central import faults
from central.errors import StorageError
from central.evaluation import Verdict
from central.federation.composition import Standing, build_payload, standing_of
from central.federation.deciding import Deciding
from central.federation.errors import FederationError, StrategyFailed, UnusableUpdate
from central.federation.grid import JournalGrid, set_aside
from central.federation.planning import least_updates
from central.federation.screening import screen_of
from central.federation.stock import make_strategy
from central.federation.strategy import ProductMean
from central.federation.trial import check_strategy
from central.federation.verify import remake
from central.fleet.quarantine import quarantine_events
from central.journal import (
    EventKind,
    Journal,
    JournalConflict,
    MergePlan,
    NewEvent,
    PlanRecord,
    ReleaseRecord,
    State,
)
from central.journal.payloads import release_blobs
from central.registry import BlobLost, BlobStore, Registry
from central.registry.canary import promotion
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
    """Run the cohort's loop in this thread until `stop` is set (seen within a second, or at the end of a merge).

    `went_on` is called whenever the loop has nothing to do but wait. Raises SettingsError for a strategy that cannot work,
    StrategyFailed when it makes nothing of a plan whatever the updates, StorageError when journal or blobs fail.
    """
    policy = settings.merge.policy(cohort)
    check_strategy(policy.strategy, policy.strategy_options, policy.min_updates)
    registry.ensure_cohort(cohort)
    grid = JournalGrid(cohort, journal, settings, stop, is_connected, clock, screen_of(policy, blobs), went_on)
    loop = CohortLoop(cohort, journal, registry, blobs, settings)
    context = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={"cohort": cohort})
    make_server_app(loop, stop)(grid, context)


def make_server_app(loop: CohortLoop, stop: threading.Event) -> ServerApp:
    """The app that takes the loop's steps until `stop` is set, on whatever JournalGrid it is started with."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        while not stop.is_set():
            loop.step(grid)

    return app


class CohortLoop:
    """One merge after the other; holds nothing between steps that is not in the journal."""

    def __init__(
        self, cohort: str, journal: Journal, registry: Registry, blobs: BlobStore, settings: CentralSettings
    ) -> None:
        self._cohort = cohort
        self._journal = journal
        self._registry = registry
        self._blobs = blobs
        self._policy = settings.merge.policy(cohort)
        self._channel = settings.channels.policy(cohort).first
        self._max_rank = settings.limits.max_rank
        self._settings = settings.gate
        self._quarantine = settings.quarantine
        self._deciding = Deciding(journal, settings.gate)

    def step(self, grid: JournalGrid) -> None:
        """Take the cohort's next plan (waiting for it if there is none) as far as its verdict; returns early when stopped."""
        strategy = make_strategy(self._policy.strategy, self._policy.strategy_options, self._blobs)
        config = ConfigRecord({"max_rank": self._max_rank})
        offers = grid.push_messages(strategy.configure_train(0, ArrayRecord(), config, grid))
        replies = grid.pull_messages(offers)
        planned = grid.open_plan()
        if planned is None:
            return
        # The plan, not today's settings, says how it is merged: settings may have changed since it was made.
        strategy = make_strategy(planned.plan.strategy, planned.plan.strategy_options, self._blobs)
        try:
            if planned.candidate is None:
                self._build(strategy, planned, replies)
            else:
                try:
                    self._mend(planned.candidate)
                except UnusableUpdate as error:  # then the candidate is given up, and its other updates are merged anew
                    self._journal.append(set_aside(self._cohort, error))
                    return
                verdict = self._deciding.decide(strategy, planned, planned.candidate, grid)
                if verdict is not None:
                    self._record(planned.candidate, verdict)
        except JournalConflict as error:
            # A rollback or an operator's decision cancelled the plan while it was worked on; the state says what is next.
            log.warning(
                "merge overtaken", extra={"cohort": self._cohort, "plan": planned.plan_id, "reason": str(error)}
            )

    def _build(self, strategy: ProductMean, planned: PlanRecord, replies: Iterable[Message]) -> None:
        with self._journal.read() as state:
            standing = standing_of(state, planned.plan)
        try:
            merged = build_payload(planned.plan, standing, strategy, self._blobs, replies)
        except BlobLost as error:
            if not self._mend_parents(planned.plan):
                self._give_up(planned.plan, standing, error)
            return
        except FederationError as error:
            self._give_up(planned.plan, standing, error)
            return
        if merged is None:
            return
        faults.reach("merge.computed")
        candidate = self._registry.add_candidate(
            planned.plan_id,
            merged.data,
            merged.truncation_error,
            merged.server_state,
            merged.own,
            merged.own_truncation_error,
        )
        log.info(
            "candidate built",
            extra={
                "cohort": self._cohort,
                "release": candidate.digest,
                "updates": len(candidate.updates),
                "truncation_error": merged.truncation_error,
            },
        )

    def _mend_parents(self, plan: MergePlan) -> bool:
        """Make lost blobs of the releases that the plan builds on again; whether there were any and all of them came back.

        Not while neither the store's mark nor an update of the plan is there: then it is the store that is away.
        """
        if self._blobs.owner() is None and not any(self._blobs.holds(update.payload) for update in plan.updates):
            return False
        try:
            mended = [self._mend(release) for release in (plan.parent, plan.builds_on) if release is not None]
        except (FederationError, StorageError):
            log.exception("lost release not mended", extra={"cohort": self._cohort, "parent": plan.parent})
            return False
        return any(mended)

    def _mend(self, release_id: str) -> bool:
        """Make the release's blobs again where one is gone or damaged; its plan gives the same bytes. True when it was so.

        Raises FederationError or StorageError when it cannot be made again.
        """
        with self._journal.read() as state:
            release = state.releases[release_id]
            blobs = release_blobs(release)
        if all(self._blobs.holds(digest) for digest in blobs):
            return False
        made = remake(self._journal, release, self._blobs)
        if missing := blobs.keys() - made.keys():
            raise FederationError(
                f"Release {release.label} has lost a blob, and its plan makes other bytes on this machine ({len(missing)} of "
                f"{len(blobs)} blobs differ). Restore the blobs from a backup."
            )
        for data in made.values():
            self._blobs.put(data)
        log.warning("lost release made again", extra={"cohort": self._cohort, "release": release_id})
        return True

    def _give_up(self, plan: MergePlan, standing: Standing, error: FederationError | BlobLost) -> None:
        """What of the plan cannot be merged is set aside, so that the others go on; a removal ends its order.

        Raises `error` where the next try may do better. So does every other StorageError: the loop starts again after a pause
        (central/cohorts.py), and merges the same plan.
        """
        if plan.removal is not None and (isinstance(error, FederationError) or standing.own in self._blobs):
            # Not tried again and again: nothing else of the cohort would be merged meanwhile.
            log.error(
                "removal failed", extra={"cohort": self._cohort, "order": plan.removal.order, "reason": str(error)}
            )
            self._journal.append(self._event(EventKind.FORGET_FAILED, plan.removal.order, {"reason": str(error)}))
        elif isinstance(error, UnusableUpdate):
            # The journal cancels the plan that loses an update; the plan's other updates wait again.
            fields = {"cohort": self._cohort, "update_id": error.update_id, "reason": str(error)}
            log.error("update set aside", extra=fields)
            self._journal.append(set_aside(self._cohort, error))
        elif isinstance(error, StrategyFailed) and self._is_of_other_settings(plan):
            log.warning("planned anew with today's strategy", extra={"cohort": self._cohort, "reason": str(error)})
            self._journal.append(self._event(EventKind.UPDATE_REQUEUED, plan.updates[0].update_id, {}))
        elif isinstance(error, StrategyFailed):
            raise StrategyFailed(
                f"{error} No single update causes it, so none is set aside. Change CENTRAL_MERGE__STRATEGY or its options and "
                "start central again: these updates are then planned anew."
            ) from error
        else:  # also a removal's, when the store has not even its parent: then it is the store that is away
            raise error

    def _is_of_other_settings(self, plan: MergePlan) -> bool:
        """Whether the plan's strategy is not today's."""
        today = (self._policy.strategy, self._policy.strategy_options)
        return (plan.strategy, plan.strategy_options) != today

    def _record(self, candidate: str, verdict: Verdict) -> None:
        # One transaction. A rollback meanwhile has cancelled the plan, and the journal then refuses the verdict.
        with self._journal.read() as state:
            release = state.releases[candidate]
            by = _accepts_loss(state, release) if not verdict.accepted else ""
            if by:
                verdict = replace(
                    verdict, accepted=True, text=f"accepted by {by} in spite of the gate, which {verdict.text}"
                )
            isolate = not verdict.accepted and self._can_isolate(state, candidate)
            body = {**vars(verdict), "isolate": isolate, **({"loss_accepted_by": by} if by else {})}
            events = [self._event(EventKind.VERDICT, candidate, body)]
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

    def _can_isolate(self, state: State, candidate: str) -> bool:
        """Whether parts of the rejected candidate are tried next; otherwise its updates are set aside. A strategy that needs
        several updates cannot try fewer.
        """
        isolation = state.isolations.get(self._cohort)
        tries = isolation.tries if isolation else 0
        plan = state.plans[state.releases[candidate].plan_id or ""].plan
        half = len(plan.updates) // 2
        return half >= least_updates(plan.strategy, plan.strategy_options) and tries < self._settings.isolation_tries

    def _event(self, kind: EventKind, subject: str, body: dict[str, Any]) -> NewEvent:
        return NewEvent(kind, self._cohort, subject, body)


def _accepts_loss(state: State, release: ReleaseRecord) -> str:
    """The operator who ordered the removal and takes the loss of skill for it; empty for everything else."""
    removal = state.plans[release.plan_id].plan.removal if release.plan_id else None
    order = state.forgets[removal.order] if removal else None
    return order.by if order and order.accept_loss else ""
