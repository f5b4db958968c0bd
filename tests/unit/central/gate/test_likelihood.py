"""Likelihood as the gate's evidence: pooling, the rule, its words, high water."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from central.gate import (
    Differences,
    Evidence,
    Figures,
    Gate,
    PairedCounts,
    PairedLikelihood,
    Verdict,
    high_water,
    open_environments,
    pool,
)

GATE = Gate(0.05, 1.0, 5.0, max_tasks=100)


def of(values: Sequence[float], reference: float = -3.0, *, anchor: bool = False) -> Any:
    """Evidence of documents that differ by `values`."""
    return PairedLikelihood("text", anchor, differences(values, reference))


def differences(values: Sequence[float], reference: float = -3.0) -> Differences:
    return Differences(
        len(values),
        10 * len(values),
        reference,
        reference + sum(values) / len(values),
        math.fsum(values),
        math.fsum(value * value for value in values),
    )


def around(mean: float, spread: float, count: int = 24) -> list[float]:
    return [mean + (spread if number % 2 else -spread) for number in range(count)]


def look(item: PairedLikelihood, *, last: bool = True, gate: Gate = GATE) -> Figures:
    return gate.look([Evidence(item, "r" * 64, "v2", last=last)])["text"]


def verdict(*items: Any, gate: Gate = GATE) -> Verdict:
    found = gate.verdict(gate.look([Evidence(item, "r" * 64, "v2") for item in items]))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("mean", "spread", "standing"),
    [
        (-0.5, 0.1, "fell"),
        (-0.06, 0.01, "fell"),
        (-0.04, 0.01, "fine"),  # surely worse, within the tolerance
        (0.0, 0.0, "fine"),
        (0.3, 0.1, "fine"),
        (-0.09, 0.01, "fell"),
        (-0.04, 0.4, "undecided"),  # neither sure of a loss nor of its absence
        (-0.2, 0.9, "undecided"),
    ],
)
def test_standing(mean: float, spread: float, standing: str) -> None:
    assert look(of(around(mean, spread)))["standing"] == standing


def test_the_figures_are_in_nats_and_hold_all_that_was_used() -> None:
    found = look(of(around(-0.25, 0.5), anchor=True))
    t = -0.25 / (0.5 * math.sqrt(24 / 23) / math.sqrt(24))
    assert found["likelihood"]["documents"] == found["total"] == 24
    assert found["likelihood"]["candidate_mean"] == pytest.approx(-3.25)
    assert (found["fall_nats"], found["tolerance_nats"], found["margin_nats"]) == (0.25, 0.05, 0.1)
    assert found["p_reference"] == pytest.approx(0.0123, abs=2e-4), t  # t = -2.398, 23 degrees
    assert not {"fall_points", "tolerance_points", "both", "attempts"} & set(found)


def test_tolerance_by_name_is_in_nats() -> None:
    wide = Gate(0.05, 1.0, 5.0, {"text": 0.6}, max_tasks=100)
    assert look(of(around(-0.5, 0.1)), gate=wide)["standing"] == "fine"
    narrow = Gate(
        0.05, 1.0, 5.0, max_tasks=100, likelihood_tolerance_nats=0, likelihood_margin_nats=0.01
    )
    assert look(of(around(-0.04, 0.01)), gate=narrow)["standing"] == "fell"


def test_one_fallen_text_rejects_beside_tasks_that_all_passed() -> None:
    tasks = PairedCounts("acme", False, 100, 0, 0, 0)
    rejected = verdict(tasks, of(around(-0.5, 0.1)))
    assert not rejected.accepted
    assert rejected.text.startswith("rejected: text fell. acme: 100 -> 100 of 100")
    assert (
        "text: -3.000 -> -3.500 nats a token over 24 documents (p 4.5e-18) "
        "(against v2, tolerance 0.05 nats, 1 node), fell." in rejected.text
    )
    assert rejected.high_water["text"] == {"release": "r" * 64}
    accepted = verdict(tasks, of(around(-0.01, 0.02)))
    assert accepted.accepted
    assert accepted.text.endswith("1 node), fine.")


def test_an_undecided_text_is_asked_more_while_it_can_be() -> None:
    vague = of(around(-0.04, 0.4))
    assert open_environments(GATE.look([Evidence(vague, "r", last=False)])) == ["text"]
    assert "Too few tasks to be sure of text" in verdict(vague).text


def test_it_shares_the_correction_with_the_other_environments() -> None:
    """p 0.03 is significant alone, and not as one of three tests."""
    weak = of(around(-0.2, 0.5))
    assert 0.02 < look(weak)["p_reference"] < 0.05
    assert look(weak)["standing"] == "fell"
    others = [PairedCounts(name, False, 100, 0, 0, 0) for name in ("a", "b")]
    assert verdict(weak, *others).accepted
    kept = {name: {"standing": "fine"} for name in ("a", "b")}
    assert GATE.look([Evidence(weak, "r")], kept)["text"]["standing"] == "undecided"


def test_one_document_never_decides() -> None:
    assert look(of([-5.0]))["standing"] == "undecided"


def test_better_moves_the_high_water_mark() -> None:
    better = look(of(around(0.5, 0.1)))
    assert better["better"]
    assert not look(of(around(0.01, 0.1)))["better"]
    verdicts = [("v1", {"text": {**better, "reference": "v0"}})]
    assert high_water(verdicts, {"v0", "v1"}) == {"text": "v1"}


def report(digest: str, found: Differences, **more: Any) -> dict[str, Any]:
    return {
        "environment": "text",
        "tasks_digest": digest,
        "anchor": True,
        "both_passed": 0,
        "only_reference_passed": 0,
        "only_candidate_passed": 0,
        "neither_passed": 0,
        "likelihood": vars(found),
        **more,
    }


def test_other_documents_are_added_up() -> None:
    one, other = [-0.1, -0.3], [0.2, 0.1, 0.5, 0.4]
    (pooled,) = pool(
        [
            ("a", [report("x", differences(one))]),
            ("b", [report("y", differences(other, -6.0), anchor=False)]),
        ]
    )
    assert isinstance(pooled, PairedLikelihood)
    together = differences(one + other)
    found = pooled.differences
    assert (found.documents, found.tokens, pooled.nodes, pooled.anchor) == (6, 60, 2, False)
    assert found.difference_sum == pytest.approx(together.difference_sum)
    assert found.difference_square_sum == pytest.approx(together.difference_square_sum)
    assert found.reference_mean == pytest.approx((2 * -3 + 4 * -6) / 6)
    assert found.candidate_mean == pytest.approx((2 * -3.2 + 4 * -5.7) / 6)


@pytest.mark.parametrize(
    ("falls", "spoken"), [([0.1, 0.5, 0.2], 0.2), ([0.1, 0.5], 0.5), ([9.0, 0.1, 0.1], 0.1)]
)
def test_of_the_same_documents_the_median_speaks(falls: list[float], spoken: float) -> None:
    reports = [
        (f"n{number}", [report("x", differences([-fall, -fall]))])
        for number, fall in enumerate(falls)
    ]
    (pooled,) = pool(reports)
    assert (pooled.total, pooled.nodes) == (2, len(falls))
    assert pooled.measures[0].fall == pytest.approx(spoken)


def test_of_tasks_and_texts_under_one_name_the_kind_of_more_nodes_counts() -> None:
    text = [(node, [report(node, differences([-0.1, -0.2]))]) for node in ("a", "b")]
    tasks = [
        (node, [{**report(node, differences([0.0])), "both_passed": 8}]) for node in ("c", "d")
    ]
    for _, (result,) in tasks:
        del result["likelihood"]
    assert isinstance(pool([*text, *tasks[:1]])[0], PairedLikelihood)
    assert isinstance(pool([*text, *tasks])[0], PairedCounts)
