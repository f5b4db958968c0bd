"""Events about contributions apart from merges and verdicts: superseded, set aside, waiting again, quarantined, forgotten; and
where a release serves.

In: events. Out: changed records (transitions.py). `State` (state.py) has all events together. Guarantees: an update is never
forgotten while the stable head holds it; from then on every release that holds it is withdrawn, and what such a release held
of others waits again unless the stable head holds it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from central.journal.events import Event
from central.journal.plan import MergePlan
from central.journal.records import ForgetRecord, NodeRecord, PlanRecord, ServedPeriod, UpdateStateName, VerdictRecord
from central.journal.transitions import REVOKED, Transitions, conflict, known

JUDGED = 100
"""Verdicts that are remembered per node."""
_FORGETTABLE: tuple[UpdateStateName, ...] = ("waiting", "planned", "merged", "superseded", "set_aside", "quarantined")


class Contributions(Transitions):
    """What happens to updates apart from merges, verdicts and rollbacks."""

    def _update_superseded(self, event: Event) -> None:
        by = known(event, self.updates, event.body["by"], "update")
        reason = f"superseded by the node's update {by.update_id}"
        self._move(event, event.subject, "superseded", ("waiting", "quarantined"), reason)

    def _update_set_aside(self, event: Event) -> None:
        self._cancel_plan_of(event, event.subject, event.body["reason"])
        self._move(event, event.subject, "set_aside", ("waiting", "quarantined"), event.body["reason"])
        if event.body.get("lost"):
            self._put_update(replace(self.updates[event.subject], lost=True))

    def _update_requeued(self, event: Event) -> None:
        update = known(event, self.updates, event.subject, "update")
        node = self.nodes[update.manifest.node_id]
        if node.revoked or node.quarantine:
            raise conflict(event, REVOKED if node.revoked else f"its node is in quarantine: {node.quarantine}")
        if gone := self.collected.get(update.manifest.payload.digest_sha256):
            raise conflict(event, f"its payload was {gone.text}")
        self._cancel_plan_of(event, event.subject)
        self._move(event, event.subject, "waiting", ("waiting", "set_aside"))

    def _node_quarantined(self, event: Event) -> None:
        node = self._expect_member(event)
        if node.revoked or node.quarantine or not event.body["reason"]:
            raise conflict(event, f"revoked: {node.revoked}, in quarantine: {node.quarantine!r}")
        # The node first: a plan that is cancelled gives its updates back to where they may be.
        self._changes.put(self.nodes, node.node_id, replace(node, quarantine=event.body["reason"]))
        for update in self.updates_of(node.node_id):
            self._cancel_plan_of(event, update.update_id)
            if self.updates[update.update_id].state == "waiting":
                self._move(event, update.update_id, "quarantined", ("waiting",), event.body["reason"])

    def _node_released(self, event: Event) -> None:
        node = self._expect_member(event)
        if not node.quarantine:
            raise conflict(event, "it is not in quarantine")
        self._changes.put(self.nodes, node.node_id, replace(node, quarantine="", judged=()))
        for update in self.updates_of(node.node_id):
            if update.state == "quarantined":
                self._move(event, update.update_id, "waiting", ("quarantined",))

    def _judge(self, update_ids: Collection[str], blamed: bool) -> None:
        """Remember a verdict on updates of nodes."""
        for update_id in update_ids:
            node = self.nodes[self.updates[update_id].manifest.node_id]
            self._changes.put(self.nodes, node.node_id, replace(node, judged=(*node.judged, blamed)[-JUDGED:]))

    def _release_served(self, event: Event) -> None:
        release = known(event, self.releases, event.subject, "release")
        node = known(event, self.nodes, event.body["node_id"], "node")
        if (release.cohort, node.cohort) != (event.cohort, event.cohort):
            raise conflict(event, f"release of {release.cohort!r}, node of {node.cohort!r}")
        if before := self.serving.get(node.node_id):
            index = self._served_at[node.node_id]
            self._changes.replace(self.served[before.release_id], index, replace(before, until=event.at))
        period = ServedPeriod(node.node_id, release.release_id, event.at)
        self._changes.put(self._served_at, node.node_id, len(self.served.get(release.release_id, ())))
        self._changes.append(self.served, release.release_id, period)
        self._changes.put(self.serving, node.node_id, period)

    # Forgetting: ordered, planned as a removal, done when the stable head holds nothing of it.

    def _forget_ordered(self, event: Event) -> None:
        self._expect_new(event, self.forgets)
        body = event.body
        pending = {update for order in self.pending_forgets(event.cohort) for update in order.updates}
        for update_id in body["updates"]:
            update = known(event, self.updates, update_id, "update")
            if update.cohort != event.cohort or update.state == "forgotten" or update_id in pending:
                raise conflict(
                    event, f"update {update_id} of cohort {update.cohort!r} is {update.state}, or is ordered"
                )
        order = ForgetRecord(
            order_id=event.subject,
            cohort=event.cohort,
            node_id=body["node_id"],
            updates=tuple(body["updates"]),
            accept_loss=body["accept_loss"],
            by=body["by"],
            at=event.at,
        )
        self._put_order(order)
        self._settle_forgets(event)

    def _forget_failed(self, event: Event) -> None:
        order = known(event, self.forgets, event.subject, "order")
        if order.cohort != event.cohort or order.state not in ("ordered", "planned"):
            raise conflict(event, f"the order of cohort {order.cohort!r} is {order.state}")
        if order.plan_id is not None and not self.plans[order.plan_id].decided:
            self._cancel(event, self.plans[order.plan_id], event.body["reason"], requeue=True)
        self._put_order(replace(order, state="failed", plan_id=None, reason=event.body["reason"]))

    def _plan_removal(self, event: Event, plan: MergePlan) -> None:
        """The removal that `plan` has is of an order that waits for one, and of what the plan's parent holds."""
        assert plan.removal is not None
        order = known(event, self.forgets, plan.removal.order, "order")
        removed = [update.update_id for update in plan.removal.updates]
        held = set(self.contributions(plan.parent)).intersection(order.updates)
        if plan.updates or order.state != "ordered" or set(removed) != held or not held:
            raise conflict(
                event, f"order {order.order_id} is {order.state}; its parent holds {len(held)} of its updates"
            )
        self._put_order(replace(order, state="planned", plan_id=event.subject))

    def _decide_removal(self, plan: PlanRecord, verdict: VerdictRecord) -> None:
        """An accepted removal is done when its release is promoted."""
        removal = plan.plan.removal
        if removal is not None and not verdict.accepted:
            order = self.forgets[removal.order]
            self._put_order(replace(order, state="rejected", reason=verdict.text))

    def _settle_forgets(self, event: Event) -> None:
        """Forget what the stable head does not hold, of every order of the cohort."""
        orders = self.pending_forgets(event.cohort)
        if not orders:
            return
        ordered = [update for order in orders for update in order.updates]
        head = self.channels[(event.cohort, "stable")]
        held = self.holders(event.cohort, ordered).get(head, frozenset())
        forgotten: list[str] = []
        for order in orders:
            for update_id in order.updates:
                if update_id not in held and self.updates[update_id].state != "forgotten":
                    self._cancel_plan_of(event, update_id)
                    self._move(event, update_id, "forgotten", _FORGETTABLE, f"by order of {order.by}, {order.at}")
                    forgotten.append(update_id)
            if held.isdisjoint(order.updates):
                self._put_order(replace(order, state="done"))
        # No release that is made later holds any of it: plans on these releases are cancelled with their withdrawal.
        for release_id in self.holders(event.cohort, forgotten):
            self._changes.put(self._holding_forgotten, release_id, None)
        self._withdraw(event)

    def _withdraw(self, event: Event) -> None:
        """Releases that hold something forgotten are never promoted again; the line's other updates stay with the line."""
        line = {release.release_id for release in self.lineage(self.channels[(event.cohort, "stable")])}
        holding = [self.releases[release_id] for release_id in self._holding_forgotten]
        holders = {release.release_id: release for release in holding if release.cohort == event.cohort}
        for release in holders.values():
            if release.state == "accepted":
                self._changes.put(self.releases, release.release_id, replace(release, state="withdrawn"))
                held = [u for u in release.manifest.updates if self._is_merged_in(u, release.release_id)]
                if release.release_id not in line:
                    self._release_updates(event, held, ("merged",), True, release.manifest.label)
        self._cancel_built_on(event, holders, "withdrawn", requeue=True)
        for cohort in [cohort for cohort, other in self.builds_on.items() if other == event.cohort]:
            self._withdraw_composed(cohort)
        for (cohort, channel), head in list(self.channels.items()):
            if cohort == event.cohort and channel != "stable" and head in holders:
                self._point(event, channel, None, "central")

    def _withdraw_composed(self, cohort: str, since: str | None = None) -> None:
        """The same for a cohort that builds on another: what its stable head has left behind; the head goes when it moves.

        With `since`, an earlier head, only what was left behind from there on: the rest was looked at when it was.
        """
        other = self.builds_on.get(cohort)
        if other is None or not any((o.cohort, o.state) == (other, "done") for o in self.forgets.values()):
            return
        release = self.releases[self.channels[(cohort, "stable")]]
        while release.release_id != since and release.manifest.parent is not None:
            release = self.releases[release.manifest.parent]
            if release.state == "accepted" and self.forgotten_in(release.release_id):
                self._changes.put(self.releases, release.release_id, replace(release, state="withdrawn"))

    def _expect_member(self, event: Event) -> NodeRecord:
        node = known(event, self.nodes, event.subject, "node")
        if node.cohort != event.cohort:
            raise conflict(event, f"node {node.node_id} is of cohort {node.cohort!r}")
        return node
