"""The gate against exact values of the tests it cites, and by simulation: it keeps its error rate and finds real falls."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from central.evaluation import Gate, Mark, PairedCounts, high_water, pool
from central.evaluation.gate import binomial_tail


def make_gate(**fields: object) -> Gate:
    values: dict[str, object] = {
        "alpha": 0.05,
        "tolerance_points": 5.0,
        "anchor_tolerance_points": 10.0,
        "environments": {},
    }
    return Gate(**{**values, **fields})  # type: ignore[arg-type]


def make_counts(both: int, b: int, c: int, neither: int, name: str = "acme-a", anchor: bool = False) -> PairedCounts:
    return PairedCounts(name, anchor, both, b, c, neither)


def make_result(name: str, digest: str, both: int, b: int, c: int, neither: int, anchor: bool = False) -> dict:
    return {
        "environment": name,
        "tasks_digest": digest,
        "anchor": anchor,
        "both_passed": both,
        "only_reference_passed": b,
        "only_candidate_passed": c,
        "neither_passed": neither,
    }


@pytest.mark.parametrize(
    ("k", "n", "p"),
    [
        (8, 10, 0.5),
        (1, 3, 0.2),
        (0, 5, 0.5),
        (30, 60, 0.45),
        (60, 60, 0.9),
        (1, 60, 0.99),
        (3, 900, 0.8),
        (200, 300, 0.1),
    ],
)
def test_binomial_tail_is_exact(k: int, n: int, p: float) -> None:
    expected = sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))
    assert binomial_tail(k, n, p) == pytest.approx(expected, rel=1e-9)


def test_binomial_tail_at_its_edges() -> None:
    assert binomial_tail(3, 2, 0.5) == 0.0
    assert binomial_tail(1, 4, 0.0) == 0.0
    assert binomial_tail(4, 4, 1.0) == 1.0
    assert 0 < binomial_tail(5200, 10_000, 0.5) < 1e-4


def test_a_weak_first_release_is_accepted() -> None:
    verdict = make_gate().decide([make_counts(0, 0, 12, 48), make_counts(53, 4, 1, 2, "public", anchor=True)], {})
    assert verdict.accepted
    assert "acme-a: 0 -> 12 of 60" in verdict.text
    assert "anchor public: 57 -> 54 of 60" in verdict.text


def test_a_significant_fall_beyond_the_tolerance_is_rejected() -> None:
    verdict = make_gate().decide([make_counts(30, 15, 2, 13), make_counts(50, 1, 5, 4, "acme-b")], {})
    assert not verdict.accepted
    assert verdict.text.startswith("rejected: acme-a fell")
    assert verdict.environments["acme-a"]["p_reference"] == pytest.approx(0.00117, abs=1e-4)
    assert verdict.environments["acme-b"]["below_reference"] is False


def test_a_fall_within_the_tolerance_is_accepted_however_significant() -> None:
    counts = make_counts(900, 40, 2, 58)
    assert make_gate().decide([counts], {}).accepted
    assert not make_gate(environments={"acme-a": 1.0}).decide([counts], {}).accepted


def test_a_large_fall_without_significance_is_accepted() -> None:
    assert make_gate().decide([make_counts(3, 2, 0, 5)], {}).accepted


def test_holm_corrects_over_environments() -> None:
    fall = make_counts(40, 10, 2, 8)  # p = 0.0193: significant alone, not among five
    others = [make_counts(50, 2, 2, 6, f"acme-{i}") for i in range(4)]
    assert not make_gate().decide([fall], {}).accepted
    assert make_gate().decide([fall, *others], {}).accepted


def test_anchor_has_its_own_tolerance() -> None:
    assert not make_gate().decide([make_counts(480, 45, 0, 75)], {}).accepted
    assert make_gate().decide([make_counts(480, 45, 0, 75, anchor=True)], {}).accepted


def test_high_water_mark_stops_losses_that_add_up() -> None:
    slow = make_counts(180, 10, 2, 48)  # 3 points below its reference, 14 below the mark
    assert make_gate().decide([slow], {}).accepted
    verdict = make_gate().decide([slow], {"acme-a": Mark(216, 240, "r")})
    assert not verdict.accepted
    assert "significantly below the high-water mark" in verdict.text
    mark = verdict.high_water["acme-a"]
    assert (mark["passed"], mark["total"], mark["release"]) == (216, 240, "r")
    assert binomial_tail(216, 240, mark["rate"]) == pytest.approx(0.05, rel=1e-6)


def test_high_water_takes_the_best_of_candidates_and_references() -> None:
    first = make_gate().decide([make_counts(50, 7, 0, 3, "public", True), make_counts(0, 0, 12, 48)], {})
    second = make_gate().decide([make_counts(12, 0, 20, 28)], {})
    marks = high_water([("r1", "r0", first.environments), ("r2", "r1", second.environments)], 0.05)
    assert marks == {"public": Mark(57, 60, "r0"), "acme-a": Mark(32, 60, "r2")}


def test_pool_counts_a_node_once_and_names_the_environment() -> None:
    first, again = make_result("acme-a", "d1", 1, 2, 3, 4), make_result("acme-a", "d1", 9, 9, 9, 9)
    other = make_result("acme-a", "d2", 10, 20, 30, 40)
    empty = make_result("idle", "d3", 0, 0, 0, 0)
    pooled = pool([("a-1", [first, again]), ("b-2", [other, empty]), ("c-3", [])])
    assert pooled == [PairedCounts("acme-a", False, 11, 22, 33, 44, nodes=2)]
    assert pooled[0].total == 110


def test_the_same_tasks_measured_by_several_nodes_count_once() -> None:
    honest, liar = make_result("public", "d", 50, 4, 1, 5, True), make_result("public", "d", 0, 55, 0, 5, True)
    alone = pool([("a", [honest])])[0]
    assert pool([("a", [honest]), ("b", [honest]), ("c", [honest])]) == [replace(alone, nodes=3)]
    assert pool([("a", [honest]), ("b", [liar]), ("c", [honest])]) == [replace(alone, nodes=3)]
    # Three nodes that repeat one measurement are no stronger evidence than one.
    fall = make_result("public", "d", 40, 4, 0, 6)
    assert make_gate().decide(pool([(node, [fall]) for node in "abc"]), {}).accepted


def test_one_node_cannot_declare_an_environment_an_anchor() -> None:
    pooled = pool([("a", [make_result("x", "1", 1, 0, 0, 0, anchor=True)]), ("b", [make_result("x", "2", 1, 0, 0, 0)])])
    assert pooled[0].anchor is False


def _simulate(rng: np.random.Generator, reference: float, candidate: float, n: int) -> PairedCounts:
    """Pairs with half of the reference's passes kept by chance (a realistic amount of discordance)."""
    task = rng.random(n)
    noise = rng.random(n) * 0.3
    old, new = task < reference, np.where(noise < 0.1, rng.random(n), task) < candidate
    return make_counts(
        int((old & new).sum()), int((old & ~new).sum()), int((~old & new).sum()), int((~old & ~new).sum())
    )


def test_error_rate_over_ten_releases_without_change_and_power_for_a_real_fall() -> None:
    rng = np.random.default_rng(0)
    gate, wrong, found, trials = make_gate(), 0, 0, 200
    for _ in range(trials):
        verdicts: list[tuple[str, str, dict]] = []
        for version in range(10):
            counts = [replace(_simulate(rng, 0.9, 0.9, 60), environment=f"e{i}") for i in range(3)]
            verdict = gate.decide(counts, high_water(verdicts, 0.05))
            wrong += not verdict.accepted
            verdicts.append((f"r{version + 1}", f"r{version}", verdict.environments))
        worse = replace(_simulate(rng, 0.9, 0.7, 60), environment="e0")
        found += not gate.decide([worse, *counts[1:]], high_water(verdicts, 0.05)).accepted
    assert wrong / (10 * trials) < 0.01
    assert found / trials > 0.8
