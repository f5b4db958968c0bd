"""What the state accepts of cohorts that build on another, and of canaries: every event that does
not fit changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from central.journal import EventKind, Journal, JournalConflict, MergePlan, NewEvent
from protos.manifest import Composition, ReleaseManifest
from tests.unit.central import builders as make


class World:
    """shared with version 1 on stable; acme builds on it, plain builds on nothing."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(f"sqlite:///{path}/journal.db", clock=lambda: make.AT)
        self.genesis = make.start_cohort(self.journal)
        self.plain = make.start_cohort(self.journal, "plain", ("p-1",))
        self.acme = make.make_release("acme")
        created = make.cohort_created(self.acme)
        body = {**created.body, "builds_on": "shared"}
        self.journal.append(
            NewEvent(created.kind, "acme", created.subject, body),
            make.token_created("acme", "token-acme"),
            make.node_enrolled("a-1", "acme", "token-acme"),
        )
        update = make.make_update(self.genesis)
        plan = make.make_plan(self.genesis, update)
        self.shared = make.make_candidate(plan)
        self.journal.append(
            make.admitted(update),
            make.planned(plan),
            make.built(self.shared),
            make.decided(self.shared, True),
            make.promoted(self.shared),
        )

    def refuses(self, event: NewEvent, message: str) -> None:
        before = self.journal.verify()
        with pytest.raises(JournalConflict, match=message):
            self.journal.append(event)
        assert self.journal.verify() == before


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.journal.close()


def composing(parent: ReleaseManifest, base: ReleaseManifest | None) -> MergePlan:
    return make.make_plan(parent).model_copy(update={"builds_on": base.digest if base else None})


def composed(plan: MergePlan, base: ReleaseManifest) -> ReleaseManifest:
    candidate = make.make_candidate(plan)
    composition = Composition(
        builds_on=base.digest, own=candidate.payload, own_truncation_error=0.0
    )
    return candidate.model_copy(update={"composition": composition})


def test_a_composition_is_planned_once_for_a_pair(world: World) -> None:
    plan = composing(world.acme, world.shared)
    candidate = composed(plan, world.shared)
    world.journal.append(make.planned(plan))
    world.refuses(make.built(make.make_candidate(plan)), "has composition None")
    world.refuses(make.built(composed(plan, world.genesis)), "has composition builds_on")
    world.journal.append(make.built(candidate), make.decided(candidate, False))
    with world.journal.read() as state:
        assert state.compositions == {(world.acme.digest, world.shared.digest): plan.digest}
        base = state.base_of(state.releases[candidate.digest])
        assert base is not None
        assert base.release_id == world.shared.digest
        assert state.base_of(state.releases[world.acme.digest]) == state.genesis("shared")
        assert state.base_of(state.releases[world.plain.digest]) is None


def test_a_plan_names_what_its_cohort_builds_on_and_nothing_else(world: World) -> None:
    world.refuses(make.planned(composing(world.acme, None)), "no update is planned")
    world.refuses(make.planned(composing(world.acme, world.plain)), "builds on shared, the plan on")
    world.refuses(make.planned(composing(world.plain, world.shared)), "builds on none, the plan on")
    update = make.make_update(world.acme, "a-1")
    world.journal.append(make.admitted(update, "acme"))
    world.refuses(
        make.planned(make.make_plan(world.acme, update)), "builds on shared, the plan on None"
    )
    world.journal.append(make.rolled_back(world.genesis, world.shared))
    world.refuses(make.planned(composing(world.acme, world.shared)), "is abandoned")
    kept = make.make_plan(world.acme, update).model_copy(update={"builds_on": world.shared.digest})
    world.journal.append(make.planned(kept))  # a merge of updates keeps the base of its head


def test_a_cohort_builds_on_one_that_is_there(world: World) -> None:
    created = make.cohort_created(make.make_release("beta"))
    beta = NewEvent(created.kind, "beta", created.subject, {**created.body, "builds_on": "nowhere"})
    world.refuses(beta, "cohort 'nowhere' is not known")


def test_a_canary_report_is_of_the_canary_and_of_its_cohort(world: World) -> None:
    def reported(release: ReleaseManifest, node: str, cohort: str = "shared") -> NewEvent:
        body = {"node_id": node, "condition": "serving", "problem": ""}
        return NewEvent(EventKind.CANARY_REPORTED, cohort, release.digest, body)

    world.refuses(reported(world.shared, "a-00000000"), "the canary is None")
    world.journal.append(make.promoted(world.shared, "canary"))
    world.refuses(reported(world.genesis, "a-00000000"), "the canary is")
    world.refuses(reported(world.shared, "p-1"), "of 'plain'")
    world.refuses(reported(world.shared, "nobody"), "is not known")
    world.journal.append(reported(world.shared, "a-00000000"))
    journal = Journal(str(world.journal._engine.url))
    with journal.read() as replayed, world.journal.read() as state:
        assert replayed.canary_reports == state.canary_reports
        assert replayed.builds_on == state.builds_on == {"acme": "shared"}
    journal.close()
