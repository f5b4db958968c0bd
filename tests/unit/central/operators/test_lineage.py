"""What explain and diff say, from a journal alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from central.cli.release_texts import difference, explanation
from central.fleet.presence import NodePresence, Presence
from central.gate import (
    Differences,
    Evidence,
    Gate,
    Outcomes,
    PairedCounts,
    PairedLikelihood,
    Verdict,
)
from central.journal import EventKind, Journal, NewEvent
from central.operators.client import plain
from central.operators.lineage import diff_releases, explain_release
from central.releases.difference import ModuleDifference
from protos.fleet.v1 import fleet_pb2
from protos.manifest import Composition, ReleaseManifest
from tests.unit.central import builders as make

GATE = Gate(0.05, 5.0, 10.0, margin_points=3.0)


class World:
    """One cohort with two nodes; its clock counts minutes."""

    def __init__(self, path: Path) -> None:
        self.minute = self.sequence = 0
        self.journal = Journal(f"sqlite:///{path}/journal.db", clock=self.clock)
        self.genesis = make.start_cohort(self.journal, nodes=("a-1", "b-2"))

    def clock(self) -> str:
        self.minute += 1
        day, hour = 1 + self.minute // 1440, self.minute // 60 % 24
        return f"2026-11-{day:02}T{hour:02}:{self.minute % 60:02}:00.000000Z"

    def release(self, parent: ReleaseManifest, *nodes: str, passes: int = 30) -> ReleaseManifest:
        candidate, events = self.planned(parent, *nodes, passes=passes)
        self.journal.append(*events)
        return candidate

    def decided(self, verdict: Verdict) -> ReleaseManifest:
        """A release of node a that was accepted with this verdict."""
        candidate, events = self.planned(self.genesis, "a-1", verdict=verdict)
        self.journal.append(*events)
        return candidate

    def planned(
        self, parent: ReleaseManifest, *nodes: str, passes: int = 30, verdict: Verdict | None = None
    ) -> tuple[ReleaseManifest, list[NewEvent]]:
        """A release and the events that make it."""
        self.sequence += 1
        updates = [
            make.make_update(parent, node, 10 * self.sequence + n) for n, node in enumerate(nodes)
        ]
        plan = make.make_plan(parent, *updates)
        candidate = make.make_candidate(plan)
        evidence = Evidence(PairedCounts("acme", False, passes, 1, 2, 10), parent.digest)
        verdict = verdict or GATE.verdict(GATE.look([evidence]))
        assert verdict is not None
        decided = NewEvent(EventKind.VERDICT, "shared", candidate.digest, dict(vars(verdict)))
        made = [make.planned(plan), make.built(candidate), decided, make.promoted(candidate)]
        return candidate, [*map(make.admitted, updates), *made]

    def explain(self, release: ReleaseManifest, presence: Presence | None = None) -> dict:
        with self.journal.read() as state:
            of = presence.of if presence else lambda node_id: NodePresence()
            return plain(explain_release(state, state.releases[release.digest], of))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_explain_names_updates_verdict_channels_and_nodes(world: World) -> None:
    first = world.release(world.genesis, "a-1", "b-2")
    second = world.release(first, "a-1")
    presence = Presence(lambda: "now")
    presence.opened("b-2")
    presence.report("b-2", fleet_pb2.NodeStatus(serving_release_id=first.digest))
    told = world.explain(first, presence)
    assert [(part["node_id"], part["weight"]) for part in told["contributions"]] == [
        ("a-1", 0.5),
        ("b-2", 0.5),
    ]
    (found,) = told["environments"]
    assert (found["environment"], found["both_passed"], found["only_candidate_passed"]) == (
        "acme",
        30,
        2,
    )
    assert (found["fell"], found["standing"], found["tolerance_points"]) == (False, "fine", 5.0)
    assert found["reference_id"] == world.genesis.digest
    (period,) = told["periods"]
    (next_period,) = world.explain(second)["periods"]
    assert (period["channel"], period["by"]) == ("stable", "tests")
    assert period["since"] < period["until"] == next_period["since"]
    assert next_period["until"] == ""
    assert told["serving"] == [{"node_id": "b-2", "connected": True, "last_seen": "now"}]
    assert (told["strategy"], told["server_step"], told["decided_at"] < period["since"]) == (
        "product-mean",
        1.0,
        True,
    )
    assert world.explain(second)["updates_in_lineage"] == {"a-1": 2, "b-2": 1}


def test_explain_survives_a_rollback_and_says_until_when(world: World) -> None:
    first = world.release(world.genesis, "a-1")
    world.journal.append(make.promoted(first, "canary"), make.rolled_back(world.genesis, first))
    told = world.explain(first)
    assert told["release"]["state"] == "abandoned"
    assert [(period["channel"], bool(period["until"])) for period in told["periods"]] == [
        ("stable", True),
        ("canary", True),
    ]
    assert [period["by"] for period in world.explain(world.genesis)["periods"]] == [
        "central",
        "tests",
    ]
    journal = Journal(str(world.journal._engine.url))
    with journal.read() as replayed, world.journal.read() as state:
        assert replayed.channel_changes == state.channel_changes
    journal.close()


def test_version_0_is_explained_too(world: World) -> None:
    with world.journal.read() as state:
        answer = explain_release(state, state.genesis("shared"), lambda node_id: NodePresence())
    lines = list(explanation(answer))
    assert "updates: none, this is the base model" in lines
    assert any(
        line.startswith("stable from 2026-11-01T00:01") and line.endswith("by central")
        for line in lines
    )


def test_explain_reads_no_journal_and_is_quick_at_ten_thousand_events(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, events = world.genesis, []
    for _ in range(1000):
        head, more = world.planned(head, *["a-1", "b-2"] * 3)
        events += more
    world.journal.append(*events)
    with world.journal.read() as state:
        assert state.sequence > 10_000
    monkeypatch.setattr(world.journal, "events", None)
    begin = time.process_time()
    told = world.explain(head)
    assert time.process_time() - begin < 1
    assert sum(told["updates_in_lineage"].values()) == 6000


def test_diff_names_updates_modules_and_pass_rates(world: World) -> None:
    first = world.release(world.genesis, "a-1")
    world.journal.append(make.rolled_back(world.genesis, first, updates="set_aside"))
    second = world.release(world.genesis, "b-2", passes=20)
    modules = [
        ModuleDifference("k", 3.0, 5.0, 1.5),
        ModuleDifference("q", 4.0, 0.0, 4.0),
        ModuleDifference("v", 0.0, 2.0, 2.0),
    ]
    with world.journal.read() as state:
        answer = diff_releases(
            state, state.releases[first.digest], state.releases[second.digest], modules
        )
        genesis = diff_releases(state, state.genesis("shared"), state.releases[second.digest], [])
    told = plain(answer)
    assert [update["node_id"] for update in told["added"]] == ["b-2"]
    assert [update["node_id"] for update in told["removed"]] == ["a-1"]
    assert [module["relative_change"] for module in told["modules"]] == [0.5, 1.0, 0.0]
    assert told["all_modules"]["norm_a"] == 5.0
    no_texts = {key: {"mean": 0.0, "documents": 0} for key in ("likelihood_a", "likelihood_b")}
    rates = {"passed_a": 32, "total_a": 43, "passed_b": 22, "total_b": 33}
    assert told["environments"] == [{"environment": "acme", **rates, **no_texts}]
    lines = list(difference(answer))
    assert "  v new, norm 2" in lines
    assert "acme: 74.4 % (32 of 43) -> 66.7 % (22 of 33)" in lines
    assert list(difference(genesis))[-1] == "acme: not measured -> 66.7 % (22 of 33)"


def test_explain_shows_pass_1_and_pass_k_and_what_was_compared_with(world: World) -> None:
    counts = PairedCounts(
        "acme", False, 80, 6, 4, 10, nodes=2, attempts=4, every_attempt=Outcomes(40, 6, 4, 50)
    )
    found = GATE.look(
        [Evidence(counts, world.genesis.digest, "v0-aaaaaaaa", fallback_reason="NOT_FOUND: gone")]
    )
    verdict = GATE.verdict(found)
    assert verdict is not None
    candidate = world.decided(verdict)
    told = world.explain(candidate)["environments"][0]
    assert (told["attempts"], told["standing"], told["better"]) == (4, "fine", False)
    assert told["every_attempt"]["outcomes"]["only_reference_passed"] == 6
    assert told["every_attempt"]["fall_points"] == 2.0
    with world.journal.read() as state:
        answer = explain_release(
            state, state.releases[candidate.digest], lambda node_id: NodePresence()
        )
    (line,) = [line for line in explanation(answer) if line.startswith("  acme")]
    assert line == (
        "  acme: 86.0 % (86 of 100) -> 84.0 % (84 of 100), all of 4 attempts 46.0 % (46 of 100) -> "
        f"44.0 % (44 of 100), against {world.genesis.digest[:8]} (its high-water release could not "
        "be used: NOT_FOUND: gone), 2 nodes, fine"
    )


def test_a_composed_release_is_explained_with_its_base_and_a_canary_with_what_nodes_told(
    world: World,
) -> None:
    base = world.release(world.genesis, "a-1")
    created = make.cohort_created(make.make_release("acme"))
    plan = make.make_plan(make.make_release("acme")).model_copy(update={"builds_on": base.digest})
    bare = make.make_candidate(plan)
    composition = Composition(builds_on=base.digest, own=bare.payload, own_truncation_error=0.0)
    composed = bare.model_copy(update={"composition": composition})
    world.journal.append(
        NewEvent(created.kind, "acme", created.subject, {**created.body, "builds_on": "shared"}),
        make.token_created("acme", "token-acme"),
        make.node_enrolled("c-3", "acme", "token-acme"),
        make.planned(plan),
        make.built(composed),
        make.decided(composed, True),
        make.promoted(composed, "canary"),
        NewEvent(
            EventKind.CANARY_REPORTED,
            "acme",
            composed.digest,
            {"node_id": "c-3", "condition": "trouble", "problem": "vLLM refused it"},
        ),
        make.rolled_back(world.genesis, base),
    )
    with world.journal.read() as state:
        answer = explain_release(
            state, state.releases[composed.digest], lambda node_id: NodePresence()
        )
        added = diff_releases(
            state, state.genesis("acme"), state.releases[composed.digest], []
        ).added
    lines = list(explanation(answer))
    assert any(f"composed with {base.label} by product-mean" in line for line in lines)
    assert (
        f"{base.label} was rolled back since: the next composition is with its cohort's stable "
        "release" in lines
    )
    assert "updates: none of its own" in lines
    assert any(
        line.startswith("canary at c-3") and line.endswith("trouble, vLLM refused it")
        for line in lines
    )
    assert any(
        "trouble at c-3: vLLM refused it; waits for the end of the trouble" in line
        for line in lines
    )
    assert [update.node_id for update in added] == ["a-1"]


def test_texts_are_shown_in_nats_a_token(world: World) -> None:
    found = Differences(24, 480, -3.0, -3.02, -0.48, 0.05)
    evidence = Evidence(PairedLikelihood("text", True, found), world.genesis.digest, "v0-aaaaaaaa")
    verdict = GATE.verdict(GATE.look([evidence]))
    assert verdict is not None
    first = world.release(world.genesis, "a-1")
    candidate = world.decided(verdict)
    told = world.explain(candidate)["environments"][0]
    assert told["likelihood"]["outcomes"]["difference_sum"] == -0.48
    assert (told["likelihood"]["fall_nats"], told["likelihood"]["tolerance_nats"]) == (0.02, 0.05)
    assert (told["anchor"], told["standing"], told["both_passed"]) == (True, "fine", 0)
    with world.journal.read() as state:
        here = state.releases[candidate.digest]
        answer = explain_release(state, here, lambda node_id: NodePresence())
        changed = diff_releases(state, state.releases[first.digest], here, [])
    assert (
        "  anchor text: -3.000 -> -3.020 nats a token (24 documents, 480 tokens), against "
        f"{world.genesis.digest[:8]}, 1 nodes, fine"
    ) in list(explanation(answer))
    assert (
        list(difference(changed))[-1] == "text: not measured -> -3.020 nats a token (24 documents)"
    )
