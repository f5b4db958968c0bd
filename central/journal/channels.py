"""Events that move channels: a release is promoted, a line is rolled back, a node tells how it fares with a canary.

In: events. Out: changed records (transitions.py). `State` (state.py) has all events together. Guarantee: a canary that is rolled
back leaves stable where it is, and what it had merged waits again or is set aside.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from central.journal.contributions import Contributions
from central.journal.events import Event
from central.journal.plan import MergePlan
from central.journal.records import CanaryReport
from central.journal.transitions import conflict, known


class Channels(Contributions):
    """What happens to channels apart from the creation of a cohort."""

    def _promoted(self, event: Event) -> None:
        self._expect_accepted(event, event.subject)
        before = self.channels[(event.cohort, "stable")]
        for channel in event.body.get("ends", ()):
            self._point(event, channel, None, event.body["by"])
        self._point(event, event.body["channel"], event.subject, event.body["by"])
        self._settle_forgets(event)
        self._withdraw_composed(event.cohort, since=before)

    def _rolled_back(self, event: Event) -> None:
        body = event.body
        abandoned: list[str] = body["abandoned"]
        rolled = body.get("channel", "stable")
        self._expect_accepted(event, event.subject)
        if self.channels.get((event.cohort, rolled)) != body["from_release"] or event.subject in abandoned:
            raise conflict(event, f"release {body['from_release']} is not the {rolled} head of {event.cohort!r}")
        if rolled != "stable" and self.channels[(event.cohort, "stable")] in abandoned:
            raise conflict(event, "the stable head would be abandoned with the canary")
        requeue = body["updates"] == "requeue"
        for release_id in abandoned:
            release = known(event, self.releases, release_id, "release")
            if release.state != "withdrawn":  # which stays withdrawn: it is the stronger word
                self._expect_accepted(event, release_id)
                self._changes.put(self.releases, release_id, replace(release, state="abandoned"))
            held = [u for u in release.manifest.updates if self._is_merged_in(u, release_id)]
            self._release_updates(event, held, ("merged",), requeue, release.manifest.label)
        self._cancel_built_on(event, abandoned, "rolled back", requeue)
        self._fail_removals(event.cohort, abandoned)
        for _, channel in [key for key, head in self.channels.items() if head in abandoned and key[1] != "stable"]:
            self._point(event, channel, None, body["by"])
        if rolled == "stable" or self.channels[(event.cohort, "stable")] != event.subject:
            self._point(event, rolled, event.subject, body["by"])
        self._settle_forgets(event)

    def _canary_reported(self, event: Event) -> None:
        node = known(event, self.nodes, event.body["node_id"], "node")
        canary = self.channels.get((event.cohort, "canary"))
        if canary != event.subject or node.cohort != event.cohort or node.revoked:
            raise conflict(
                event, f"the canary is {canary}; node {node.node_id} of {node.cohort!r}, revoked {node.revoked}"
            )
        report = CanaryReport(node.node_id, event.body["condition"], event.body["problem"], event.at)
        self._changes.append(self.canary_reports, event.subject, report)

    def _plan_composition(self, event: Event, plan: MergePlan) -> None:
        """A plan names a release of the cohort that its own builds on, if there is one; without updates a stable one."""
        other = self.builds_on.get(event.cohort)
        base = self.releases.get(plan.builds_on or "")
        if (base.cohort if base else None) != other or (plan.builds_on is not None and base is None):
            raise conflict(event, f"cohort {event.cohort!r} builds on {other or 'none'}, the plan on {plan.builds_on}")
        if base is not None and not plan.updates and plan.removal is None:
            if base.state != "accepted":
                raise conflict(event, f"release {base.release_id} of {other!r} is {base.state}")
            self._changes.put(self.compositions, (plan.parent, base.release_id), event.subject)

    def _fail_removals(self, cohort: str, abandoned: Collection[str]) -> None:
        # Only a canary can hold a removal that is not done: it is done when stable has it.
        for order in self.pending_forgets(cohort):
            made = self.plans[order.plan_id].candidate if order.plan_id else None
            if made in abandoned:
                failed = replace(order, state="failed", plan_id=None, reason="its release was rolled back from canary")
                self._put_order(failed)
