"""The state: what the events so far imply. The only derived truth at central.

In: events, one by one. Out: records by id. Guarantees: `apply` checks an event against the state before it changes
anything and raises JournalConflict; every change since `mark` can be undone, so that a group of events is applied
whole or not at all. Replaying the same events gives the same state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from central.journal.channels import Channels
from central.journal.collections import Collections
from central.journal.events import Event, EventKind
from central.journal.isolation import after_verdict, bisect
from central.journal.plan import MergePlan
from central.journal.records import (
    EvaluationRecord,
    EvaluationReport,
    NodeRecord,
    PlanRecord,
    ReleaseRecord,
    ReleaseStateName,
    Suite,
    TokenRecord,
    TrainOfferRecord,
    UpdateRecord,
    VerdictRecord,
)
from central.journal.transitions import conflict, known
from protos.manifest import UpdateManifest, sha256_hex


class State(Channels, Collections):
    """Records that change through `apply` alone."""

    def apply(self, event: Event) -> None:
        """Take over one event; raises JournalConflict (and may leave changes that `rollback` undoes)."""
        _APPLY[event.kind](self, event)
        self._changes.assign(self, "sequence", event.sequence)
        self._changes.assign(self, "last_hash", event.hash)

    def mark(self) -> None:
        """Forget how to undo what was done so far."""
        self._changes.forget()

    def rollback(self) -> None:
        """Undo everything since `mark`."""
        self._changes.undo()

    def _token_created(self, event: Event) -> None:
        self._expect_new(event, self.tokens)
        body = event.body
        token = TokenRecord(
            token_id=event.subject,
            cohort=event.cohort,
            secret_sha256=body["secret_sha256"],
            uses=body["uses"],
            expires_at=body["expires_at"],
            created_at=event.at,
            readmits=body.get("readmits", ""),
        )
        if token.readmits:
            self._expect_revoked(event, token.readmits)
        self._changes.put(self.tokens, event.subject, token)

    def _expect_revoked(self, event: Event, node_id: str) -> None:
        node = known(event, self.nodes, node_id, "node")
        if not node.revoked:
            raise conflict(event, f"node {node_id} is not revoked")

    def _token_revoked(self, event: Event) -> None:
        token = known(event, self.tokens, event.subject, "token")
        if token.revoked or token.cohort != event.cohort:
            raise conflict(event, f"token {token.token_id} of cohort {token.cohort!r} was revoked: {token.revoked!r}")
        self._changes.put(self.tokens, token.token_id, replace(token, revoked=event.body["reason"]))

    def _node_enrolled(self, event: Event) -> None:
        self._expect_new(event, self.nodes)
        body = event.body
        token = known(event, self.tokens, body["token_id"], "token")
        if token.cohort != event.cohort or token.used >= token.uses or token.revoked:
            raise conflict(
                event,
                f"token {token.token_id} of cohort {token.cohort!r} was used {token.used} of "
                f"{token.uses} times, revoked: {token.revoked!r}",
            )
        self._changes.put(self.tokens, token.token_id, replace(token, nodes=(*token.nodes, event.subject)))
        self._changes.put(
            self.nodes,
            event.subject,
            NodeRecord(
                node_id=event.subject,
                name=body["name"],
                cohort=event.cohort,
                token_id=token.token_id,
                public_key_pem=body["public_key_pem"],
                base=body["base"],
                certificate_sha256=body["certificate_sha256"],
                enrolled_at=event.at,
            ),
        )
        self._changes.append(self._members, event.cohort, event.subject)

    def _node_revoked(self, event: Event) -> None:
        node = known(event, self.nodes, event.subject, "node")
        self._changes.put(self.nodes, node.node_id, replace(node, revoked=True))

    def _journal_loss_accepted(self, event: Event) -> None:
        """For the record alone."""

    def _cohort_created(self, event: Event) -> None:
        if event.cohort in self._genesis:
            raise conflict(event, f"cohort {event.cohort!r} exists already")
        self._name_blobs_of(self._add_release(event, "accepted", None))
        self._changes.put(self._genesis, event.cohort, event.subject)
        self._point(event, "stable", event.subject, "central")
        if other := event.body.get("builds_on"):
            known(event, self._genesis, other, "cohort")
            self._changes.put(self.builds_on, event.cohort, other)

    def _train_offered(self, event: Event) -> None:
        known(event, self._genesis, event.cohort, "cohort")
        body = event.body
        offer = TrainOfferRecord(event.subject, event.cohort, body["max_rank"])
        self._changes.put(self.train_offers, event.cohort, offer)

    def _update_admitted(self, event: Event) -> None:
        self._expect_new(event, self.updates)
        data = event.body["manifest"].encode()
        manifest, digest = UpdateManifest.from_bytes(data), sha256_hex(data)
        node = known(event, self.nodes, manifest.node_id, "node")
        if node.cohort != event.cohort or digest != event.subject or node.revoked:
            raise conflict(
                event, f"node {node.node_id} is of cohort {node.cohort!r}, revoked: {node.revoked}, manifest {digest}"
            )
        record = UpdateRecord(
            update_id=event.subject,
            manifest=manifest,
            cohort=event.cohort,
            state="quarantined" if node.quarantine else "waiting",
            reason=node.quarantine,
            admitted_at=event.at,
            admitted_sequence=event.sequence,
            admitted_hash=event.hash,
        )
        self._put_update(record)
        self._changes.append(self._by_payload, manifest.payload.digest_sha256, event.subject)
        self._name_blobs([manifest.payload.digest_sha256])
        key = (manifest.node_id, manifest.start.release)
        self._changes.append(self._by_start, key, event.subject)
        self._changes.append(self._by_node, manifest.node_id, event.subject)

    def _merge_planned(self, event: Event) -> None:
        self._expect_new(event, self.plans)
        data = event.body["plan"].encode()
        plan, digest = MergePlan.from_bytes(data), sha256_hex(data)
        parent = known(event, self.releases, plan.parent, "release")
        if digest != event.subject or plan.cohort != event.cohort or parent.cohort != event.cohort:
            raise conflict(event, f"plan {digest} of cohort {plan.cohort!r} builds on one of {parent.cohort!r}")
        if plan.removal is not None:
            self._plan_removal(event, plan)
        elif not plan.updates and plan.builds_on is None:
            raise conflict(event, "no update is planned")
        self._plan_composition(event, plan)
        if parent.state != "accepted":
            raise conflict(event, f"parent {parent.release_id} is {parent.state}")
        suspected, planned_ids = self.suspects(event.cohort), {planned.update_id for planned in plan.updates}
        for planned in plan.updates:
            update = known(event, self.updates, planned.update_id, "update")
            if update.cohort != event.cohort or update.manifest.payload.digest_sha256 != planned.payload:
                raise conflict(
                    event, f"update {update.update_id} of cohort {update.cohort!r} has another payload or cohort"
                )
            self._move(event, planned.update_id, "planned", ("waiting",), plan_id=event.subject)
        suspects = {update.update_id for update in suspected}
        isolates = self.isolations[event.cohort].plan_id if suspects >= planned_ids > set() else None
        self._put_plan(PlanRecord(event.subject, plan, isolates=isolates))

    def _candidate_built(self, event: Event) -> None:
        record = known(event, self.plans, event.body["plan_id"], "plan")
        if record.decided or record.candidate is not None or record.plan.cohort != event.cohort:
            raise conflict(event, f"plan {record.plan_id} was cancelled or has candidate {record.candidate}")
        release = self._add_release(event, "candidate", record.plan_id)
        self._name_blobs_of(release)
        planned = [update.update_id for update in record.plan.updates]
        if (release.manifest.plan, release.manifest.updates) != (record.plan_id, planned):
            raise conflict(event, f"the manifest names plan {release.manifest.plan} or other updates than its plan")
        composition = release.manifest.composition
        if (composition.builds_on if composition else None) != record.plan.builds_on:
            raise conflict(event, f"the manifest has composition {composition}, the plan {record.plan.builds_on}")
        self._put_plan(replace(record, candidate=event.subject))
        for update_id in planned:
            self._put_update(replace(self.updates[update_id], release_id=event.subject))

    def _evaluation_offered(self, event: Event) -> None:
        self._expect_new(event, self.evaluations)
        body = event.body
        references: dict[str, str] = body.get("references", {})
        for release_id in (body["candidate"], body["reference"], *references.values()):
            if known(event, self.releases, release_id, "release").cohort != event.cohort:
                raise conflict(event, f"release {release_id} is of another cohort")
        self._changes.put(
            self.evaluations,
            event.subject,
            EvaluationRecord(
                offer_id=event.subject,
                cohort=event.cohort,
                candidate=body["candidate"],
                reference=body["reference"],
                tasks=body["tasks"],
                deadline_at=body["deadline_at"],
                nodes=tuple(body["nodes"]),
                look=body.get("look", 1),
                references=references,
                suites={name: Suite(**suite) for name, suite in body.get("suites", {}).items()},
                so_far=body.get("so_far", {}),
                attempts=body.get("attempts", 1),
                temperature=body.get("temperature", 0.0),
            ),
        )
        self._list(self._offers, body["candidate"], event.subject, True)

    def _evaluation_reported(self, event: Event) -> None:
        record = known(event, self.evaluations, event.subject, "evaluation")
        body = event.body
        if (node_id := body["node_id"]) in record.reports or node_id not in record.nodes:
            raise conflict(event, f"node {node_id} has reported already or was not asked")
        late = self.releases[record.candidate].state != "candidate"
        report = EvaluationReport(node_id, tuple(body["results"]), body["abstain_reason"], event.at, late)
        self._changes.put(self.evaluations, event.subject, replace(record, reports={**record.reports, node_id: report}))
        node = self.nodes[node_id]
        # A result in time, whether the verdict waited for it or not: the next one waits again.
        in_time = datetime.fromisoformat(event.at) <= datetime.fromisoformat(record.deadline_at)
        if node.silent_since and report.results and in_time:
            self._changes.put(self.nodes, node_id, replace(node, silent_since=""))

    def _node_silent(self, event: Event) -> None:
        node = self._expect_member(event)
        offer = known(event, self.evaluations, event.body["offer_id"], "evaluation")
        report = offer.reports.get(node.node_id)
        if node.silent_since or node.node_id not in offer.nodes or (report is not None and report.results):
            raise conflict(event, f"it is silent since {node.silent_since!r}, was not asked, or gave a result")
        self._changes.put(self.nodes, node.node_id, replace(node, silent_since=event.at))

    def _verdict(self, event: Event) -> None:
        release = known(event, self.releases, event.subject, "release")
        if release.state != "candidate" or release.plan_id is None or release.cohort != event.cohort:
            raise conflict(
                event, f"release {release.release_id} is {release.state}, not a candidate of {event.cohort!r}"
            )
        body = event.body
        accepted = bool(body["accepted"])
        loss_accepted_by = body.get("loss_accepted_by", "")
        verdict = VerdictRecord(
            accepted, body["text"], body["environments"], body["high_water"], event.at, loss_accepted_by
        )
        state: ReleaseStateName = "accepted" if accepted else "rejected"
        self._changes.put(self.releases, release.release_id, replace(release, state=state, verdict=verdict))
        plan = self.plans[release.plan_id]
        self._put_plan(replace(plan, decided=True))
        updates, isolate = release.manifest.updates, not accepted and bool(body.get("isolate", False))
        if isolate and len(updates) < 2:
            raise conflict(event, "a candidate of one update cannot be isolated any further")
        for update_id in () if isolate else updates:
            if accepted:
                self._move(event, update_id, "merged", ("planned",))
            else:
                self._move(event, update_id, "set_aside", ("planned",), _why_rejected(plan, release, verdict))
        if accepted or len(updates) == 1:
            self._judge(updates, blamed=not accepted)
        if isolate:
            self._release_updates(event, updates, ("planned",), True, release.manifest.label)
        if plan.plan.removal is None:
            self._isolate(event, plan, isolate)
        else:
            self._decide_removal(plan, verdict)

    def _isolate(self, event: Event, plan: PlanRecord, isolate: bool) -> None:
        updates = [update.update_id for update in plan.plan.updates]
        halves = bisect((self.updates[u].manifest.node_id, u) for u in updates) if isolate else ()
        current = self.isolations.get(event.cohort)
        ours = current if plan.isolates or not isolate else None  # another rejection begins another search
        waiting = {update.update_id for update in self.waiting(event.cohort)}
        after = after_verdict(ours, plan.plan_id, waiting.difference(updates), halves)
        if after is not None:
            self._changes.put(self.isolations, event.cohort, after)
        elif current is not None:
            self._changes.drop(self.isolations, event.cohort)


def _why_rejected(plan: PlanRecord, release: ReleaseRecord, verdict: VerdictRecord) -> str:
    number = len(release.manifest.updates)
    what = "of this update alone" if number == 1 else f"of {number} updates"
    found = (
        f"isolated: candidate {release.manifest.label} {what}"
        if plan.isolates
        else f"candidate {release.manifest.label}"
    )
    return f"{found} was rejected: {verdict.text}"


_APPLY: dict[EventKind, Callable[[State, Event], None]] = {kind: getattr(State, f"_{kind.value}") for kind in EventKind}
