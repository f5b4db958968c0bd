"""The merge of one plan: its candidate is built, or what of the plan cannot be merged is given up.

In: a plan in the journal without a candidate. Out: a candidate in the registry, or an event that
ends the plan. Guarantees: everything follows from the plan, so a plan whose merge was interrupted
is merged again to the same bytes. A release whose blobs are lost is made again from its own plan.
"""

from __future__ import annotations

import logging

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from central import faults
from central.blobs import BlobLost, BlobStore
from central.cohort.errors import FederationError, StrategyFailed, UnusableUpdate
from central.cohort.payload import MergedPayload, Standing, build_payload, standing_of
from central.cohort.planning import set_aside
from central.cohort.strategies.flower import make_strategy
from central.cohort.verify import remake
from central.errors import StorageError
from central.journal import EventKind, Journal, MergePlan, NewEvent, PlanRecord
from central.journal.payloads import release_blobs
from central.releases import Registry
from central.settings import MergePolicy

log = logging.getLogger(__name__)


class Builder:
    """One per cohort's loop."""

    def __init__(
        self, journal: Journal, registry: Registry, blobs: BlobStore, policy: MergePolicy
    ) -> None:
        self._journal = journal
        self._registry = registry
        self._blobs = blobs
        self._policy = policy

    def build(self, planned: PlanRecord, grid: Grid) -> None:
        """Merge the plan into a candidate, or give up what cannot be merged.

        Raises StrategyFailed when the strategy makes nothing of the updates and none of them causes
        it, StorageError when the next try may do better.
        """
        plan = planned.plan
        with self._journal.read() as state:
            standing = standing_of(state, plan)
        try:
            merged = self._merge(planned, standing, grid)
        except BlobLost as error:
            if not self._mend_parents(plan):
                self._give_up(plan, standing, error)
            return
        except FederationError as error:
            self._give_up(plan, standing, error)
            return
        if merged is not None:
            self._add_candidate(planned, merged)

    def _merge(self, planned: PlanRecord, standing: Standing, grid: Grid) -> MergedPayload | None:
        # The plan, not today's settings, says how it is merged: they may have changed since it was
        # made.
        strategy = make_strategy(planned.plan, standing.start, self._blobs)
        asked = strategy.configure_train(
            planned.plan.version, ArrayRecord(), ConfigRecord({"plan": planned.plan_id}), grid
        )
        replies = grid.send_and_receive(asked)
        return build_payload(planned.plan, standing, strategy, self._blobs, replies)

    def _add_candidate(self, planned: PlanRecord, merged: MergedPayload) -> None:
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
                "cohort": planned.plan.cohort,
                "release": candidate.digest,
                "updates": len(candidate.updates),
                "truncation_error": merged.truncation_error,
            },
        )

    def mend(self, release_id: str) -> bool:
        """Make the release's blobs again where one is gone or damaged; True when one was.

        Raises FederationError or StorageError when the blobs cannot be made again.
        """
        with self._journal.read() as state:
            release = state.releases[release_id]
            blobs = release_blobs(release)
        if all(self._blobs.holds(digest) for digest in blobs):
            return False
        made = remake(self._journal, release, self._blobs)
        if missing := blobs.keys() - made.keys():
            raise FederationError(
                f"Release {release.label} has lost a blob, and its plan makes other bytes on this "
                "machine "
                f"({len(missing)} of {len(blobs)} blobs differ). Restore the blobs from a backup."
            )
        for data in made.values():
            self._blobs.put(data)
        log.warning(
            "lost release made again", extra={"cohort": release.cohort, "release": release_id}
        )
        return True

    def _mend_parents(self, plan: MergePlan) -> bool:
        """Make lost blobs that the plan builds on again. True: there were any, and all came back.

        Nothing is made while neither the store's mark nor an update of the plan is there: then the
        store is away.
        """
        if self._blobs.owner() is None and not any(
            self._blobs.holds(update.payload) for update in plan.updates
        ):
            return False
        try:
            releases = [release for release in (plan.parent, plan.builds_on) if release is not None]
            mended = [self.mend(release) for release in releases]
        except (FederationError, StorageError):
            log.exception(
                "lost release not mended", extra={"cohort": plan.cohort, "parent": plan.parent}
            )
            return False
        return any(mended)

    def _give_up(
        self, plan: MergePlan, standing: Standing, error: FederationError | BlobLost
    ) -> None:
        """Set aside what cannot be merged, so that the others go on; a removal ends its order.

        Raises `error` where the next try may do better: then the loop starts again after a pause
        (central/cohorts.py) and merges the same plan.
        """
        if plan.removal is not None and (
            isinstance(error, FederationError) or standing.start.parent in self._blobs
        ):
            # It is not tried again and again: nothing else of the cohort would be merged meanwhile.
            order = plan.removal.order
            log.error(
                "removal failed",
                extra={"cohort": plan.cohort, "order": order, "reason": str(error)},
            )
            reason = {"reason": str(error)}
            self._journal.append(NewEvent(EventKind.FORGET_FAILED, plan.cohort, order, reason))
        elif isinstance(error, UnusableUpdate):
            # The journal cancels the plan that loses an update; the plan's other updates wait
            # again.
            set_aside(self._journal, plan.cohort, error)
        elif isinstance(error, StrategyFailed) and self._is_of_other_settings(plan):
            log.warning(
                "planned anew with today's strategy",
                extra={"cohort": plan.cohort, "reason": str(error)},
            )
            first = plan.updates[0].update_id
            self._journal.append(NewEvent(EventKind.UPDATE_REQUEUED, plan.cohort, first, {}))
        elif isinstance(error, StrategyFailed):
            raise StrategyFailed(
                f"{error} No single update causes it, so none is set aside. Change "
                "CENTRAL_MERGE__STRATEGY or its "
                "options and start central again: these updates are then planned anew."
            ) from error
        else:  # also a removal's, when the store has not even its parent: then the store is away
            raise error

    def _is_of_other_settings(self, plan: MergePlan) -> bool:
        today = (self._policy.strategy, self._policy.strategy_options)
        return (plan.strategy, plan.strategy_options) != today
