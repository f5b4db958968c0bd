"""Events that do not fit the journal: each is refused with its reason, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from central.journal import EventKind, Journal, JournalConflict, NewEvent
from protos.manifest import ReleaseManifest
from tests.unit.central import builders as make

A, B, D = "a-00000000", "b-00000000", "d-00000000"


class Story:
    """Two cohorts. `first` is shared's stable release, with a's update; b's waits."""

    def __init__(self, path: Path) -> None:
        self.journal = Journal(f"sqlite:///{path}")
        self.genesis = make.start_cohort(self.journal, nodes=(A, B))
        self.other = make.start_cohort(self.journal, "acme", (D,))
        self.merged, self.waiting = (make.make_update(self.genesis, node) for node in (A, B))
        self.journal.append(make.admitted(self.merged), make.admitted(self.waiting))
        self.plan = make.make_plan(self.genesis, self.merged)
        self.first = make.make_candidate(self.plan)
        self.journal.append(
            make.planned(self.plan),
            make.built(self.first),
            make.decided(self.first, True),
            make.promoted(self.first),
        )

    def expect_conflict(self, text: str, *events: NewEvent) -> None:
        """The last event is refused; those before it are not recorded either."""
        count = self.journal.verify()
        with pytest.raises(JournalConflict, match=text):
            self.journal.append(*events)
        assert self.journal.verify() == count


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path / "journal.db")


def say(kind: EventKind, subject: str, cohort: str = "shared", **body: object) -> NewEvent:
    return NewEvent(kind, cohort, subject, body)


def collected(subject: str, *digests: str) -> NewEvent:
    blobs = [{"digest": digest, "size_bytes": 1, "reason": "kept"} for digest in digests]
    return say(EventKind.BLOBS_COLLECTED, subject, blobs=blobs, by="tests")


def offered(candidate: ReleaseManifest, reference: ReleaseManifest, *nodes: str) -> NewEvent:
    fields = {"tasks": 10, "deadline_at": make.AT, "nodes": list(nodes)}
    return say(
        EventKind.EVALUATION_OFFERED,
        "offer",
        candidate=candidate.digest,
        reference=reference.digest,
        **fields,
    )


def test_a_cohort_begins_once_and_with_its_own_manifest(story: Story) -> None:
    again = make.make_release(created_at="2026-11-23T12:00:00.000000Z")
    story.expect_conflict("cohort 'shared' exists already", make.cohort_created(again))
    event = make.cohort_created(make.make_release("zeta"))
    wrong = NewEvent(event.kind, "eta", event.subject, event.body)
    story.expect_conflict("its manifest has digest .* and cohort 'zeta'", wrong)
    wrong = NewEvent(event.kind, "zeta", "0" * 64, event.body)
    story.expect_conflict("its manifest has digest", wrong)


def test_a_collection_names_blobs_that_are_there_and_ends_once(story: Story) -> None:
    blob = make.digest_of("blob")
    story.expect_conflict("0 blobs, collection known: False", collected("c1"))
    story.expect_conflict("blob .* was collected already", collected("c1", blob, blob))
    story.journal.append(collected("c1", blob))
    other = make.digest_of("other")
    story.expect_conflict("1 blobs, collection known: True", collected("c1", other))
    story.expect_conflict("was collected already", collected("c2", blob))
    finished = say(EventKind.COLLECTION_FINISHED, "c1")
    story.journal.append(finished)
    story.expect_conflict("no such unfinished collection", finished)
    story.journal.append(collected("c1", other))


def test_a_token_is_made_and_revoked_once_by_its_own_cohort(story: Story) -> None:
    token = make.token_created(token_id="t")
    story.expect_conflict("t exists already", token, token)
    story.journal.append(token)
    revoked = say(EventKind.TOKEN_REVOKED, "t", reason="lost", by="tests")
    foreign = NewEvent(revoked.kind, "acme", "t", revoked.body)
    story.expect_conflict("token t of cohort 'shared' was revoked: ''", foreign)
    story.journal.append(revoked)
    story.expect_conflict("token t of cohort 'shared' was revoked: 'lost'", revoked)
    readmits = NewEvent(token.kind, "shared", "u", {**token.body, "readmits": A})
    story.expect_conflict(f"node {A} is not revoked", readmits)
    story.journal.append(say(EventKind.NODE_REVOKED, A, by="tests"), readmits)


def test_a_plan_is_of_its_cohort_and_builds_on_an_accepted_release(story: Story) -> None:
    plan = make.make_plan(story.first, story.waiting)
    event = make.planned(plan)
    for wrong in (
        NewEvent(event.kind, "acme", event.subject, event.body),
        NewEvent(event.kind, "shared", "0" * 64, event.body),
    ):
        story.expect_conflict("plan .* of cohort 'shared' builds on one of 'shared'", wrong)
    foreign = plan.model_copy(update={"parent": story.other.digest})
    story.expect_conflict("builds on one of 'acme'", make.planned(foreign))
    empty = plan.model_copy(update={"updates": []})
    story.expect_conflict("no update is planned", make.planned(empty))
    composed = plan.model_copy(update={"builds_on": story.other.digest})
    story.expect_conflict("cohort 'shared' builds on none, the plan on", make.planned(composed))
    story.journal.append(make.rolled_back(story.genesis, story.first))
    story.expect_conflict(f"parent {story.first.digest} is abandoned", event)


def test_a_candidate_is_built_once_as_planned(story: Story) -> None:
    plan = make.make_plan(story.first, story.waiting)
    candidate = make.make_candidate(plan)
    other = make.make_candidate(plan).model_copy(update={"updates": []})
    story.expect_conflict("or other updates than its plan", make.planned(plan), make.built(other))
    story.expect_conflict(
        f"has candidate {candidate.digest}",
        make.planned(plan),
        make.built(candidate),
        make.built(candidate),
    )


def test_an_evaluation_is_of_releases_of_its_cohort(story: Story) -> None:
    for pair in ((story.first, story.other), (story.other, story.first)):
        story.expect_conflict(
            f"release {story.other.digest} is of another cohort", offered(*pair, A)
        )
    unknown = make.make_release(version=9)
    story.expect_conflict("release .* is not known", offered(story.first, unknown, A))


def test_a_report_is_of_a_node_that_was_asked_and_has_not_reported(story: Story) -> None:
    def report(node: str) -> NewEvent:
        body = {"node_id": node, "results": [], "abstain_reason": "busy"}
        return say(EventKind.EVALUATION_REPORTED, "offer", **body)

    story.journal.append(offered(story.first, story.genesis, A))
    story.expect_conflict(f"node {B} has reported already or was not asked", report(B))
    story.journal.append(report(A))
    story.expect_conflict(f"node {A} has reported already", report(A))


def test_only_a_node_that_was_asked_and_gave_nothing_is_silent(story: Story) -> None:
    def silent(node: str) -> NewEvent:
        return say(EventKind.NODE_SILENT, node, offer_id="offer")

    story.journal.append(offered(story.first, story.genesis, A))
    story.expect_conflict("it is silent since '', was not asked", silent(B))
    result = {"environment": "desk"}
    report = {"node_id": A, "results": [result], "abstain_reason": ""}
    reported = say(EventKind.EVALUATION_REPORTED, "offer", **report)
    story.expect_conflict("or gave a result", reported, silent(A))
    story.journal.append(silent(A))
    story.expect_conflict("it is silent since '2", silent(A))


def test_a_node_goes_into_quarantine_once_and_for_a_reason(story: Story) -> None:
    story.expect_conflict(
        "in quarantine: ''", say(EventKind.NODE_QUARANTINED, A, reason="", by="tests")
    )
    for foreign in (EventKind.NODE_QUARANTINED, EventKind.NODE_RELEASED):
        event = say(foreign, A, "acme", reason="no", by="tests")
        story.expect_conflict(f"node {A} is of cohort 'shared'", event)
    quarantined = say(EventKind.NODE_QUARANTINED, A, reason="blamed", by="tests")
    story.journal.append(quarantined)
    story.expect_conflict("in quarantine: 'blamed'", quarantined)
    released = say(EventKind.NODE_RELEASED, A, by="tests")
    story.journal.append(released)
    story.expect_conflict("it is not in quarantine", released)


def test_a_node_serves_a_release_of_its_own_cohort(story: Story) -> None:
    for release, node, text in (
        (story.other, A, "release of 'acme', node of 'shared'"),
        (story.first, D, "release of 'shared', node of 'acme'"),
    ):
        served = say(EventKind.RELEASE_SERVED, release.digest, node_id=node)
        story.expect_conflict(text, served)


def test_the_canarys_nodes_report_on_it_and_no_others(story: Story) -> None:
    def report(node: str, release: ReleaseManifest = story.first) -> NewEvent:
        body = {"node_id": node, "condition": "serving", "problem": ""}
        return say(EventKind.CANARY_REPORTED, release.digest, **body)

    story.expect_conflict(f"the canary is None; node {A} of 'shared'", report(A))
    story.journal.append(make.promoted(story.first, "canary"))
    story.expect_conflict(": node 'nobody' is not known", report("nobody"))
    story.expect_conflict(f"node {D} of 'acme'", report(D))
    story.expect_conflict("the canary is", report(A, story.genesis))
    story.expect_conflict("revoked True", say(EventKind.NODE_REVOKED, A, by="tests"), report(A))
    story.journal.append(report(A))


def test_a_rollback_leaves_the_head_for_an_accepted_release(story: Story) -> None:
    back = make.rolled_back(story.genesis, story.first)
    wrong = NewEvent(back.kind, "shared", back.subject, {**back.body, "from_release": "0" * 64})
    story.expect_conflict("release 0+ is not the stable head of 'shared'", wrong)
    both = {**back.body, "abandoned": [story.genesis.digest, story.first.digest]}
    story.expect_conflict(
        "is not the stable head of 'shared'", NewEvent(back.kind, "shared", back.subject, both)
    )
    story.journal.append(make.promoted(story.first, "canary"))
    canary = NewEvent(back.kind, "shared", back.subject, {**back.body, "channel": "canary"})
    story.expect_conflict("the stable head would be abandoned with the canary", canary)


def test_an_update_whose_payload_is_gone_does_not_wait_again(story: Story) -> None:
    aside = say(EventKind.UPDATE_SET_ASIDE, story.waiting.digest, reason="tests")
    gone = collected("c1", story.waiting.payload.digest_sha256)
    again = say(EventKind.UPDATE_REQUEUED, story.waiting.digest)
    story.expect_conflict("its payload was .*", aside, gone, again)
    story.journal.append(aside, again)


def test_the_quota_counts_what_is_on_disk_and_no_releases(story: Story) -> None:
    def kept() -> list[int]:
        with story.journal.read() as state:
            return [state.kept_bytes(node) for node in (A, B)]

    assert kept() == [0, 100], "what is merged is the cohort's"
    digest = story.waiting.payload.digest_sha256
    story.journal.append(
        say(EventKind.UPDATE_SET_ASIDE, story.waiting.digest, reason="tests"),
        collected("c1", digest),
    )
    assert kept() == [0, 0]
    same = make.make_update(story.first, B, 2, payload=story.waiting.payload)
    story.journal.append(make.admitted(same))
    assert kept() == [0, 200], "an event names the blob again, so both updates have it"
    story.journal.append(
        say(EventKind.UPDATE_SET_ASIDE, same.digest, reason="its blob is gone", lost=True)
    )
    assert kept() == [0, 100]


def test_a_canary_soaks_until_stable_reaches_it(story: Story) -> None:
    def soaking() -> str | None:
        with story.journal.read() as state:
            release = state.soaking("shared")
            return None if release is None else release.release_id

    assert soaking() is None
    plan = make.make_plan(story.first, story.waiting)
    second = make.make_candidate(plan)
    story.journal.append(make.planned(plan), make.built(second), make.decided(second, True))
    story.journal.append(make.promoted(second, "canary"))
    assert soaking() == second.digest
    with story.journal.read() as state:
        canary, stable = state.releases[second.digest], state.releases[story.first.digest]
        assert state.descends(canary, stable)
        assert state.descends(canary, canary)
        assert not state.descends(stable, canary)
        assert not state.descends(canary, state.releases[story.other.digest])
    story.journal.append(make.promoted(second))
    assert soaking() is None
