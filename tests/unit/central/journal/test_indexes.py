"""Each index of the state is what a scan of its records finds: after random events, refused ones
and groups that are taken back.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from central.journal import EventKind, JournalConflict, MergePlan, NewEvent, State
from central.journal.events import chain
from central.journal.plan import PlannedUpdate, Removal
from protos.manifest import Composition, Payload, ReleaseManifest
from tests.unit.central import builders as make

COHORTS = ("shared", "acme", "zeta")
BUILDS_ON = {"acme": "shared"}
STEPS = 250


class Story:
    """Random events, many of which do not fit."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.state = State()
        self.taken: list[Any] = []
        self.kinds: Counter[EventKind] = Counter()
        self.number = 0
        for cohort in COHORTS:
            genesis = make.make_release(cohort)
            created = make.cohort_created(genesis)
            if cohort in BUILDS_ON:
                created = replace(created, body={**created.body, "builds_on": BUILDS_ON[cohort]})
            nodes = [f"{cohort}-{number}" for number in range(4)]
            token = make.token_created(cohort, f"token-{cohort}")
            self.apply(
                created,
                token,
                *(make.node_enrolled(node, cohort, f"token-{cohort}") for node in nodes),
            )

    def apply(self, *news: NewEvent) -> bool:
        """As Journal.append does it."""
        state, events = self.state, []
        state.mark()
        try:
            for new in news:
                events.append(chain(new, state.sequence + 1, make.AT, state.last_hash))
                state.apply(events[-1])
        except JournalConflict:
            state.rollback()
            return False
        self.taken += events
        self.kinds.update(event.kind for event in events)
        return True

    def step(self) -> list[NewEvent]:
        """The events of one random action; not applied."""
        cohort = self.random.choice(COHORTS)
        if (plans := self.state.open_plans(cohort)) and self.random.random() < 0.6:
            return self.go_on(self.random.choice(plans))
        actions: tuple[Callable[[str], list[NewEvent]], ...] = (
            *(self.admit,) * 6,
            *(self.plan,) * 4,
            self.forget,
            *(self.remove,) * 2,
            self.move_update,
            self.move_node,
            self.move_channel,
            self.serve,
        )
        return self.random.choice(actions)(cohort)

    def head(self, cohort: str) -> ReleaseManifest:
        return self.state.releases[self.state.channels[(cohort, "stable")]].manifest

    def admit(self, cohort: str) -> list[NewEvent]:
        self.number += 1
        node, start = f"{cohort}-{self.random.randrange(4)}", self.head(cohort)
        payload = Payload(
            digest_sha256=make.digest_of(f"payload {self.random.randrange(40)}"), size_bytes=100
        )
        return [make.admitted(make.make_update(start, node, self.number, payload=payload), cohort)]

    def plan(self, cohort: str) -> list[NewEvent]:
        waiting = self.state.waiting(cohort)
        chosen = self.random.sample(waiting, min(len(waiting), self.random.randint(0, 3)))
        return [
            self.planned(
                cohort, make.make_plan(self.head(cohort), *(update.manifest for update in chosen))
            )
        ]

    def planned(self, cohort: str, plan: MergePlan) -> NewEvent:
        self.number += 1
        bases = [r for r in self.state.releases.values() if r.cohort == BUILDS_ON.get(cohort)]
        builds_on = self.random.choice(bases).release_id if bases else None
        return make.planned(plan.model_copy(update={"seed": self.number, "builds_on": builds_on}))

    def go_on(self, record: Any) -> list[NewEvent]:
        plan = record.plan
        if record.candidate is None:
            own = Payload(digest_sha256=make.digest_of(record.plan_id), size_bytes=10)
            composed = plan.builds_on and Composition(
                builds_on=plan.builds_on, own=own, own_truncation_error=0.0
            )
            return [
                make.built(
                    make.make_candidate(plan).model_copy(update={"composition": composed or None})
                )
            ]
        candidate = self.state.releases[record.candidate].manifest
        self.number += 1
        offer = f"offer-{self.number}"
        asked = {
            "candidate": candidate.digest,
            "reference": plan.parent,
            "tasks": 1,
            "deadline_at": make.AT,
            "nodes": [],
        }
        look = NewEvent(EventKind.EVALUATION_OFFERED, plan.cohort, offer, asked)
        accepted = self.random.random() < 0.7
        verdict = make.decided(candidate, accepted)
        if not accepted and self.random.random() < 0.5:
            verdict = replace(verdict, body={**verdict.body, "isolate": True})
        events = [verdict]
        if accepted and self.random.random() < 0.8:
            events.append(
                make.promoted(candidate, self.random.choice(("stable", "stable", "canary")))
            )
        return self.random.choice(([look], events, events))

    def forget(self, cohort: str) -> list[NewEvent]:
        self.number += 1
        known = [
            u for u in self.state.updates.values() if u.cohort == cohort and u.state != "forgotten"
        ]
        merged = [u for u in known if u.state == "merged"]
        updates = [u.update_id for u in (merged if self.random.random() < 0.7 else known)]
        chosen = self.random.sample(updates, min(len(updates), self.random.randint(1, 2)))
        body = {"node_id": "", "updates": chosen, "accept_loss": False, "by": "tests"}
        return [NewEvent(EventKind.FORGET_ORDERED, cohort, f"order-{self.number}", body)]

    def remove(self, cohort: str) -> list[NewEvent]:
        orders = self.state.pending_forgets(cohort)
        if not orders:
            return []
        order = self.random.choice(orders)
        if self.random.random() < 0.1:
            return [NewEvent(EventKind.FORGET_FAILED, cohort, order.order_id, {"reason": "tests"})]
        head = self.head(cohort)
        held = [u for u in self.state.contributions(head.digest) if u in order.updates]
        payloads = {
            update: self.state.updates[update].manifest.payload.digest_sha256 for update in held
        }
        removal = Removal(
            order=order.order_id,
            since=self.state.genesis(cohort).release_id,
            updates=[PlannedUpdate(update_id=u, payload=payloads[u], weight=1.0) for u in held],
            merges=1,
        )
        return [self.planned(cohort, make.make_plan(head).model_copy(update={"removal": removal}))]

    def move_update(self, cohort: str) -> list[NewEvent]:
        updates = [u.update_id for u in self.state.updates.values() if u.cohort == cohort]
        if not updates:
            return []
        update, other = self.random.choice(updates), self.random.choice(updates)
        return [
            self.random.choice(
                (
                    NewEvent(EventKind.UPDATE_SUPERSEDED, cohort, update, {"by": other}),
                    NewEvent(EventKind.UPDATE_SET_ASIDE, cohort, update, {"reason": "tests"}),
                    NewEvent(EventKind.UPDATE_REQUEUED, cohort, update, {"by": "tests"}),
                )
            )
        ]

    def move_node(self, cohort: str) -> list[NewEvent]:
        node = f"{cohort}-{self.random.randrange(4)}"
        kinds = (EventKind.NODE_QUARANTINED, EventKind.NODE_RELEASED, EventKind.NODE_RELEASED)
        kind = EventKind.NODE_REVOKED if self.random.random() < 0.05 else self.random.choice(kinds)
        return [NewEvent(kind, cohort, node, {"reason": "tests", "by": "tests"})]

    def move_channel(self, cohort: str) -> list[NewEvent]:
        line = self.state.lineage(self.head(cohort).digest)
        if len(line) < 2 or self.random.random() < 0.3:
            accepted = [
                r
                for r in self.state.releases.values()
                if (r.cohort, r.state) == (cohort, "accepted")
            ]
            release = self.random.choice(accepted)
            return (
                [make.promoted(release.manifest, self.random.choice(("stable", "canary")))]
                if release not in line
                else []
            )
        return [
            make.rolled_back(
                line[1].manifest,
                line[0].manifest,
                updates=self.random.choice(("requeue", "set_aside")),
            )
        ]

    def serve(self, cohort: str) -> list[NewEvent]:
        release = self.random.choice(self.state.lineage(self.head(cohort).digest)).release_id
        return [
            NewEvent(
                EventKind.RELEASE_SERVED,
                cohort,
                release,
                {"node_id": f"{cohort}-{self.random.randrange(4)}"},
            )
        ]


def _some(numbers: dict[tuple[str, str], int]) -> dict[tuple[str, str], int]:
    return {key: number for key, number in numbers.items() if number}


def check(state: State) -> None:
    """Every question that an index answers, asked of the records."""
    updates, forgotten = (
        list(state.updates.values()),
        {u.update_id for u in state.updates.values() if u.state == "forgotten"},
    )
    releases = state.releases.values()
    assert _some(state.updates.numbers) == Counter((u.cohort, u.state) for u in updates)
    assert _some(state.releases.numbers) == Counter((r.cohort, r.state) for r in releases)
    assert state.releases.verdicts == Counter(
        (r.cohort, r.verdict.accepted) for r in releases if r.verdict
    )
    for cohort in COHORTS:
        members = [n.node_id for n in state.nodes.values() if n.cohort == cohort and not n.revoked]
        assert state.members(cohort) == members
        assert state.open_plans(cohort) == [
            p for p in state.plans.values() if p.plan.cohort == cohort and not p.decided
        ]
        pending = [
            o
            for o in state.forgets.values()
            if o.cohort == cohort and o.state in ("ordered", "planned")
        ]
        assert state.pending_forgets(cohort) == pending
        assert state.waiting(cohort) == [
            u for u in updates if (u.cohort, u.state) == (cohort, "waiting")
        ]
        gone = forgotten.union(*(order.updates for order in pending))
        refused = {
            u.manifest.payload.digest_sha256
            for u in updates
            if u.cohort == cohort and u.update_id in gone
        }
        payloads = {u.manifest.payload.digest_sha256 for u in updates}
        assert {
            payload for payload in payloads if state.is_forgotten_payload(cohort, payload)
        } == refused
    for node in state.nodes:
        own = [u for u in updates if u.manifest.node_id == node]
        assert state.updates_of(node) == own
        assert state.kept_bytes(node) == sum(
            u.manifest.payload.size_bytes for u in own if state.updates.takes_of_quota(u)
        )
        for start in state.releases:
            assert state.updates_from(node, start) == [
                u for u in own if u.manifest.start.release == start
            ]
        last = [
            p
            for periods in state.served.values()
            for p in periods
            if p.node_id == node and not p.until
        ]
        assert last == ([state.serving[node]] if node in state.serving else [])
    for release in state.releases.values():
        assert state.offers_of(release.release_id) == [
            o for o in state.evaluations.values() if o.candidate == release.release_id
        ]
        held = [u for u in state.contributions(release.release_id) if u in forgotten]
        assert state.has_forgotten(release.release_id) == bool(held)
        base = state.base_of(release)
        held += [u for u in state.contributions(base.release_id) if u in forgotten] if base else []
        assert state.forgotten_in(release.release_id) == held
        assert release.label == release.manifest.label
    for cohort, other in BUILDS_ON.items():
        if any((order.cohort, order.state) == (other, "done") for order in state.forgets.values()):
            behind = state.lineage(state.channels[(cohort, "stable")])[1:]
            assert not [
                r for r in behind if r.state == "accepted" and state.forgotten_in(r.release_id)
            ]


def content(state: State) -> dict[str, Any]:
    """Everything in the state, each slice's indexes too; an index without an entry says the same as
    an empty one.
    """
    found: dict[str, Any] = {}
    for name, value in vars(state).items():
        if name == "changes":
            continue
        found[name] = dict(value) if isinstance(value, dict) else value
        for index, entries in getattr(value, "__dict__", {}).items():
            if index not in ("_changes", "_collected", "_updates", "_served"):
                found[f"{name}.{index}"] = dict(entries)
    return {
        name: {key: entry for key, entry in value.items() if entry not in ({}, (), 0)}
        if isinstance(value, dict)
        else value
        for name, value in found.items()
    }


@pytest.mark.parametrize("seed", range(4))
def test_indexes_are_what_a_scan_finds(seed: int) -> None:
    story = Story(seed)
    for _ in range(STEPS):
        events = story.step()
        before = copy.deepcopy(content(story.state))
        if (
            story.random.random() < 0.3
        ):  # the last of the group does not fit: all of it is taken back
            assert not story.apply(*events, make.promoted(make.make_release("shared", 99)))
            assert content(story.state) == before
        if not story.apply(*events):
            assert content(story.state) == before
        check(story.state)
    again = State()
    for event in story.taken:
        again.apply(event)
        again.mark()
    assert content(again) == content(story.state)
    told = {
        EventKind.FORGET_ORDERED,
        EventKind.PROMOTED,
        EventKind.ROLLED_BACK,
        EventKind.EVALUATION_OFFERED,
    }
    assert told <= story.kinds.keys(), "a story in which too little happens"
