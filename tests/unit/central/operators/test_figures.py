"""What a release and its ancestors gained and lost, from a journal alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from central.cli.release_texts import continual_lines
from central.gate import Differences, Evidence, Gate, Outcomes, PairedCounts, PairedLikelihood
from central.journal import EventKind, Journal, NewEvent, State
from central.operators.client import plain
from central.operators.figures import each_figures, figures_of
from central.operators.listing import release_message
from protos.manifest import ReleaseManifest
from tests.unit.central import builders as make

GATE = Gate(0.05, 5.0, 10.0, margin_points=3.0)
ANCHOR = "public"
MEASURED_BY = {"a-1": ("own-a", ANCHOR), "b-2": ("own-b", ANCHOR)}
Found = Mapping[str, tuple[int, int]]
"""Environment -> tasks of ten that reference and candidate passed."""


def counts(name: str, reference: int, candidate: int, **rest: Any) -> PairedCounts:
    both = min(reference, candidate)
    outcomes = (both, reference - both, candidate - both, 10 - max(reference, candidate))
    return PairedCounts(name, name == ANCHOR, *outcomes, **rest)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(f"sqlite:///{tmp_path}/journal.db", clock=lambda: make.AT)
    yield journal
    journal.close()


def release(
    journal: Journal,
    parent: ReleaseManifest,
    node: str,
    found: list[Evidence],
    *,
    accepted: bool = True,
    metrics: dict[str, float] | None = None,
) -> ReleaseManifest:
    """A candidate with an update of `node`, which both nodes measure."""
    with journal.read() as state:
        number = state.sequence
    update = make.make_update(parent, node, number, metrics=metrics or {})
    plan = make.make_plan(parent, update)
    candidate = make.make_candidate(plan)
    offer = f"offer-{number}"
    asked = {"candidate": candidate.digest, "reference": parent.digest, "tasks": 10}
    asked |= {"deadline_at": make.AT, "nodes": list(MEASURED_BY)}
    journal.append(make.admitted(update), make.planned(plan), make.built(candidate))
    journal.append(NewEvent(EventKind.EVALUATION_OFFERED, "shared", offer, asked))
    for told, names in MEASURED_BY.items():
        results = [{"environment": name} for name in names]
        body = {"node_id": told, "results": results, "abstain_reason": ""}
        journal.append(NewEvent(EventKind.EVALUATION_REPORTED, "shared", offer, body))
    verdict = {"accepted": accepted, "text": "", "environments": GATE.look(found), "high_water": {}}
    decided = NewEvent(EventKind.VERDICT, "shared", candidate.digest, verdict)
    journal.append(decided, *([make.promoted(candidate)] if accepted else []))
    return candidate


def against(reference: ReleaseManifest, found: Found) -> list[Evidence]:
    return [Evidence(counts(name, *of), reference.digest) for name, of in found.items()]


def figures(state: State, manifest: ReleaseManifest) -> dict[str, Any]:
    record = state.releases[manifest.digest]
    found = plain(release_message(state, record, continual=figures_of(state, record)))["continual"]
    return {key: round(v, 6) if isinstance(v, float) else v for key, v in found.items() if v}


def test_each_release_has_figures_of_its_own_line(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=("a-1", "b-2"))
    first_row = against(genesis, {"own-a": (1, 9), "own-b": (2, 4), ANCHOR: (9, 8)})
    first = release(journal, genesis, "a-1", first_row)
    bad_row = against(first, {"own-a": (9, 0), ANCHOR: (8, 8)})
    bad = release(journal, first, "b-2", bad_row, accepted=False)
    second_row = against(first, {"own-a": (9, 7), "own-b": (4, 8), ANCHOR: (8, 9)})
    second = release(journal, first, "b-2", second_row, metrics={"kl_release": 0.05, "steps": 3.0})
    with journal.read() as state:
        assert figures_of(state, state.genesis("shared")) is None
        assert figures(state, first) == {
            "environments": 3,
            "average": 70.0,
            "backward_transfer": -10.0,
            "forward_transfer": 20.0,
            "forgetting": 10.0,
            "worst_environment": ANCHOR,
            "worst_best": 90.0,
            "worst_now": 80.0,
        }
        assert figures(state, bad)["worst_environment"] == "own-a"
        assert figures(state, second) == {
            "environments": 3,
            "average": 80.0,
            "backward_transfer": -10.0,
            "forward_transfer": 20.0,
            "forgetting": 10.0,
            "worst_environment": "own-a",
            "worst_best": 90.0,
            "worst_now": 70.0,
            "kl_release": 0.05,
            "kl_updates": 1,
        }
        everything = list(state.releases.values())
        assert [found for _, found in each_figures(state, everything)] == [
            figures_of(state, record) for record in everything
        ]
        record = state.releases[second.digest]
        lines = list(
            continual_lines(release_message(state, record, continual=figures_of(state, record)))
        )
    assert lines == [
        "average success (ACC): 80.0 % over 3 environments",
        "change since learnt (backward transfer): -10.0 points",
        "gain before learnt (forward transfer): +20.0 points",
        "below its best (forgetting): +10.0 points",
        "furthest below its best: own-a, 90.0 % -> 70.0 %",
        "KL of its updates from their start: 0.050 nats a token (mean of 1)",
    ]


def test_several_attempts_and_texts(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=("a-1", "b-2"))
    every = Outcomes(4, 1, 2, 3)
    found = [
        Evidence(counts("own-a", 8, 9, attempts=4, every_attempt=every), genesis.digest),
        Evidence(counts("own-b", 2, 3), genesis.digest),
        Evidence(
            PairedLikelihood("text", False, Differences(24, 400, -3.3, -3.4, -2.4, 0.5)),
            genesis.digest,
        ),
    ]
    made = release(journal, genesis, "a-1", found)
    with journal.read() as state:
        told = figures(state, made)
    assert (told["attempts"], told["every_attempt"]) == (4, 60.0)
    assert (told["environments"], told["average"]) == (2, 60.0)


def test_a_release_that_nobody_measured_has_none(journal: Journal) -> None:
    genesis = make.start_cohort(journal, nodes=("a-1", "b-2"))
    made = release(journal, genesis, "a-1", [])
    with journal.read() as state:
        record = state.releases[made.digest]
        assert figures_of(state, record) is None
        message = release_message(state, record, continual=figures_of(state, record))
        assert not message.HasField("continual")
        assert plain(message)["continual"]["average"] is None
        assert list(continual_lines(message)) == []
