"""The state: which transitions are legal; every admitted update is in exactly one state."""

from __future__ import annotations

from pathlib import Path

import pytest

from central.journal import EventKind, Journal, JournalConflict, NewEvent
from protos.manifest import ReleaseManifest, UpdateManifest
from tests.unit.central import builders as make

NODES = ("a-00000000", "b-00000000")


class Story:
    """A cohort with two waiting updates, one per node."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(f"sqlite:///{path}")
        self.genesis = make.start_cohort(self.journal, nodes=NODES)
        self.updates = [make.make_update(self.genesis, node) for node in NODES]
        for update in self.updates:
            self.journal.append(make.admitted(update))

    def candidate(self, parent: ReleaseManifest, *updates: UpdateManifest) -> ReleaseManifest:
        plan = make.make_plan(parent, *updates)
        self.journal.append(make.planned(plan))
        candidate = make.make_candidate(plan)
        self.journal.append(make.built(candidate))
        return candidate

    def release(self, parent: ReleaseManifest, *updates: UpdateManifest) -> ReleaseManifest:
        candidate = self.candidate(parent, *updates)
        self.journal.append(make.decided(candidate, True), make.promoted(candidate))
        return candidate

    def states(self) -> list[str]:
        with self.journal.read() as state:
            return [record.state for record in state.updates.values()]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "journal.db")


def test_an_accepted_candidate_merges_its_updates(story: Story) -> None:
    candidate = story.candidate(story.genesis, *story.updates)
    assert story.states() == ["planned", "planned"]
    story.journal.append(make.decided(candidate, True), make.promoted(candidate))
    assert story.states() == ["merged", "merged"]
    with story.journal.read() as state:
        head = state.head("shared")
        assert head is not None
        assert (head.release_id, head.state) == (candidate.digest, "accepted")
        assert {update.release_id for update in state.updates.values()} == {candidate.digest}
        assert state.open_plans("shared") == []


def test_a_rejected_candidate_sets_its_updates_aside_with_the_reason(story: Story) -> None:
    candidate = story.candidate(story.genesis, story.updates[0])
    story.journal.append(make.decided(candidate, False, "anchor fell"))
    assert story.states() == ["set_aside", "waiting"]
    with story.journal.read() as state:
        assert "anchor fell" in state.updates[story.updates[0].digest].reason
        assert state.channels[("shared", "stable")] == story.genesis.digest
    with pytest.raises(JournalConflict, match="is rejected in cohort"):
        story.journal.append(make.promoted(candidate))
    with pytest.raises(JournalConflict, match="not a candidate"):
        story.journal.append(make.decided(candidate, True))


def test_an_update_is_planned_once(story: Story) -> None:
    story.candidate(story.genesis, story.updates[0])
    with pytest.raises(JournalConflict, match="is planned, not waiting"):
        story.journal.append(make.planned(make.make_plan(story.genesis, *story.updates)))
    assert story.states() == ["planned", "waiting"]


def test_an_update_of_another_cohort_is_never_planned(story: Story) -> None:
    genesis = make.start_cohort(story.journal, "zeta", ("d-00000000",))
    foreign = make.make_update(genesis, "d-00000000")
    with pytest.raises(JournalConflict, match="is of cohort"):
        story.journal.append(make.admitted(foreign, "shared"))
    story.journal.append(make.admitted(foreign, "zeta"))
    with pytest.raises(JournalConflict, match="another payload or cohort"):
        story.journal.append(make.planned(make.make_plan(story.genesis, foreign)))


@pytest.mark.parametrize(
    ("choice", "expected"), [("requeue", "waiting"), ("set_aside", "set_aside")]
)
def test_rollback_frees_merged_updates_and_cancels_the_merge_under_way(
    story: Story, choice: str, expected: str
) -> None:
    first = story.release(story.genesis, story.updates[0])
    second = story.candidate(first, story.updates[1])
    story.journal.append(make.promoted(first, "canary"))
    story.journal.append(make.rolled_back(story.genesis, first, updates=choice))
    assert story.states() == [expected, expected]
    with story.journal.read() as state:
        assert state.releases[first.digest].state == "abandoned"
        assert state.releases[second.digest].state == "rejected"
        assert state.channels == {("shared", "stable"): story.genesis.digest}
        assert state.open_plans("shared") == []
        held_by = [first.digest, second.digest] if choice == "set_aside" else [None, None]
        assert [update.release_id for update in state.updates.values()] == held_by
    with pytest.raises(JournalConflict, match="not a candidate"):
        story.journal.append(make.decided(second, True))


def test_requeued_updates_wait_in_admission_order(story: Story) -> None:
    first = story.release(story.genesis, story.updates[0])
    story.journal.append(make.rolled_back(story.genesis, first))
    with story.journal.read() as state:
        assert [update.update_id for update in state.waiting("shared")] == [
            u.digest for u in story.updates
        ]


def test_taking_an_update_away_cancels_a_plan_without_candidate(story: Story) -> None:
    plan = make.make_plan(story.genesis, *story.updates)
    story.journal.append(make.planned(plan))
    aside = NewEvent(
        EventKind.UPDATE_SET_ASIDE, "shared", story.updates[0].digest, {"reason": "broken"}
    )
    story.journal.append(aside)
    assert story.states() == ["set_aside", "waiting"]
    with pytest.raises(JournalConflict, match="was cancelled"):
        story.journal.append(make.built(make.make_candidate(plan)))


def test_a_revoked_nodes_updates_never_wait_again(story: Story) -> None:
    first = story.release(story.genesis, story.updates[0])
    story.release(first, story.updates[1])
    story.journal.append(NewEvent(EventKind.NODE_REVOKED, "shared", NODES[0], {"by": "tests"}))
    assert story.states() == ["merged", "merged"]
    with story.journal.read() as state:
        head = state.head("shared")
        assert head is not None
        second = head.manifest
    story.journal.append(make.rolled_back(story.genesis, first, second))
    assert story.states() == ["set_aside", "waiting"]
    with story.journal.read() as state:
        assert state.updates[story.updates[0].digest].reason == "its node was revoked"
    with pytest.raises(JournalConflict, match="its node was revoked"):
        story.journal.append(NewEvent(EventKind.UPDATE_REQUEUED, "shared", story.updates[0].digest))
    with pytest.raises(JournalConflict, match="revoked: True"):
        story.journal.append(make.admitted(make.make_update(story.genesis, NODES[0], 2)))


def test_taking_an_update_of_a_candidate_away_rejects_the_candidate(story: Story) -> None:
    candidate = story.candidate(story.genesis, *story.updates)
    aside = NewEvent(
        EventKind.UPDATE_SET_ASIDE, "shared", story.updates[0].digest, {"reason": "broken"}
    )
    story.journal.append(aside)
    assert story.states() == ["set_aside", "waiting"]
    with story.journal.read() as state:
        record = state.releases[candidate.digest]
        assert record.verdict is not None
        assert (record.state, state.open_plans("shared")) == ("rejected", [])
        assert (
            record.verdict.text
            == f"cancelled: update {story.updates[0].digest[:8]} was taken away: broken"
        )
    with pytest.raises(JournalConflict, match="not a candidate"):
        story.journal.append(make.decided(candidate, True), make.promoted(candidate))


def test_a_node_reports_once_and_only_when_asked(story: Story) -> None:
    candidate = story.candidate(story.genesis, *story.updates)
    body = {
        "candidate": candidate.digest,
        "reference": story.genesis.digest,
        "tasks": 60,
        "deadline_at": make.AT,
        "nodes": [NODES[0]],
    }
    story.journal.append(NewEvent(EventKind.EVALUATION_OFFERED, "shared", "offer", body))

    def report(node_id: str) -> NewEvent:
        result = {"node_id": node_id, "results": [{"environment": "e"}], "abstain_reason": ""}
        return NewEvent(EventKind.EVALUATION_REPORTED, "shared", "offer", result)

    story.journal.append(report(NODES[0]))
    for node_id in NODES:
        with pytest.raises(JournalConflict, match="reported already or was not asked"):
            story.journal.append(report(node_id))
    with story.journal.read() as state:
        assert list(state.evaluations["offer"].reports) == [NODES[0]]


def test_a_token_is_used_up(tmp_path: Path) -> None:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db")
    journal.append(
        make.cohort_created(make.make_release()), make.token_created(uses=1), make.node_enrolled()
    )
    with pytest.raises(JournalConflict, match="used 1 of 1 times"):
        journal.append(make.node_enrolled("b-00000000"))
