"""The gate's rule, look by look: what falls, what is fine, what is asked again, and what the
verdict says of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from central.gate import (
    Evidence,
    Figures,
    Gate,
    Outcomes,
    PairedCounts,
    Verdict,
    open_environments,
    pool,
)
from protos.manifest import canonical_json


def make_gate(**fields: object) -> Gate:
    """One look of any size, unless told otherwise."""
    values: dict[str, object] = {
        "alpha": 0.05,
        "tolerance_points": 5.0,
        "anchor_tolerance_points": 10.0,
    }
    return Gate(**{**values, **fields})  # type: ignore[arg-type]


def make_counts(
    both: int, b: int, c: int, neither: int, name: str = "acme-a", anchor: bool = False
) -> PairedCounts:
    return PairedCounts(name, anchor, both, b, c, neither)


def decide(gate: Gate, *counts: PairedCounts) -> Verdict:
    verdict = gate.verdict(gate.look([Evidence(item, "r0") for item in counts]))
    assert verdict is not None
    return verdict


def make_result(
    name: str, digest: str, both: int, b: int, c: int, neither: int, anchor: bool = False
) -> dict:
    return {
        "environment": name,
        "tasks_digest": digest,
        "anchor": anchor,
        "both_passed": both,
        "only_reference_passed": b,
        "only_candidate_passed": c,
        "neither_passed": neither,
    }


# One look.


def test_a_weak_first_release_is_accepted() -> None:
    verdict = decide(
        make_gate(), make_counts(0, 0, 12, 48), make_counts(53, 4, 1, 2, "public", anchor=True)
    )
    assert verdict.accepted
    assert "acme-a: 0 -> 12 of 60" in verdict.text
    assert "anchor public: 57 -> 54 of 60" in verdict.text


def test_a_significant_fall_beyond_the_tolerance_is_rejected() -> None:
    verdict = decide(make_gate(), make_counts(30, 15, 2, 13), make_counts(50, 1, 5, 4, "acme-b"))
    assert not verdict.accepted
    assert verdict.text.startswith("rejected: acme-a fell. ")
    assert verdict.environments["acme-a"]["p_reference"] == pytest.approx(0.00117, abs=1e-4)
    assert verdict.environments["acme-a"]["standing"] == "fell"
    assert verdict.environments["acme-b"]["standing"] == "fine"
    assert verdict.high_water == {"acme-a": {"release": "r0"}, "acme-b": {"release": "r0"}}
    canonical_json(dict(vars(verdict)))  # what the journal takes


def test_a_fall_within_the_tolerance_is_accepted_however_significant() -> None:
    counts = make_counts(900, 40, 2, 58)
    assert decide(make_gate(), counts).accepted
    assert not decide(make_gate(environments={"acme-a": 1.0}), counts).accepted


def test_a_fall_of_exactly_the_tolerance_is_within_it() -> None:
    assert decide(make_gate(), make_counts(900, 50, 0, 50)).accepted
    assert not decide(make_gate(), make_counts(900, 51, 0, 49)).accepted


def test_figures_have_three_decimals() -> None:
    found = decide(make_gate(tolerance_points=10 / 3), make_counts(2, 1, 0, 0)).environments
    figures = found["acme-a"]
    assert (figures["fall_points"], figures["tolerance_points"]) == (33.333, 3.333)
    assert figures["margin_points"] == 5.833


def test_a_large_fall_without_significance_is_accepted_and_the_text_says_so() -> None:
    verdict = decide(make_gate(), make_counts(3, 2, 0, 5))
    assert verdict.text.startswith(
        "accepted: no environment fell. Too few tasks to be sure of acme-a. "
    )
    assert verdict.environments["acme-a"]["standing"] == "undecided"


def test_holm_corrects_over_environments() -> None:
    fall = make_counts(40, 10, 2, 8)  # p = 0.0193: significant alone, not among five
    others = [make_counts(50, 2, 2, 6, f"acme-{i}") for i in range(4)]
    assert not decide(make_gate(), fall).accepted
    assert decide(make_gate(), fall, *others).accepted


def test_anchor_has_its_own_tolerance() -> None:
    assert not decide(make_gate(), make_counts(480, 45, 0, 75)).accepted
    assert decide(make_gate(), make_counts(480, 45, 0, 75, anchor=True)).accepted


def test_a_fallback_is_named() -> None:
    item = Evidence(
        make_counts(50, 1, 1, 8),
        "r1",
        "v1-aaaaaaaa",
        fallback_reason="Release v0 has rank 9; expected 8.",
    )
    verdict = make_gate().verdict(make_gate().look([item]))
    assert verdict is not None
    assert "(against v1-aaaaaaaa, tolerance 5 points, 1 node), " in verdict.text
    assert (
        "not against its high-water release, because Release v0 has rank 9; expected 8."
        in verdict.text
    )


# Several looks.

SEQUENTIAL = make_gate(tolerance_points=1.0, max_tasks=6400)


def look(counts: PairedCounts, before: Figures | None = None, *, last: bool = False) -> Figures:
    spent = before["spent"] if before else 0.0
    return SEQUENTIAL.look([Evidence(counts, "r0", spent=spent, last=last)])[counts.environment]


def test_an_undecided_environment_is_open_until_its_last_task() -> None:
    counts = make_counts(70, 10, 10, 10)
    found = look(counts)
    assert (found["standing"], found["last"], found["spent"]) == ("undecided", False, 100 / 6400)
    assert open_environments({"acme-a": found}) == ["acme-a"]
    assert SEQUENTIAL.verdict({"acme-a": found}) is None
    closed = look(counts, last=True)
    assert (closed["last"], closed["spent"]) == (True, 1.0)
    assert SEQUENTIAL.verdict({"acme-a": closed}).accepted  # type: ignore[union-attr]
    assert look(make_counts(4480, 640, 640, 640))["last"], "max_tasks are the last"


def test_alpha_is_spent_look_by_look_and_never_twice() -> None:
    fall = make_counts(60, 25, 8, 7)  # p = 0.0023
    assert look(fall)["standing"] == "undecided", "0.0023 / (100/6400) is not significant"
    assert look(fall, last=True)["standing"] == "fell", "with all of alpha it is"
    before = {"spent": 0.97}
    assert look(fall, before, last=True)["standing"] == "undecided", (
        "with 3 % of alpha left it is not"
    )
    totals, spent = [100, 200, 400, 800, 1600, 3200, 6400], []
    found: Figures | None = None
    for total in totals:
        found = look(make_counts(total, 0, 0, 0), found)
        spent.append(found["spent"])
    assert spent == [total / 6400 for total in totals]


def test_a_small_look_spends_little_on_what_could_hide_a_loss() -> None:
    sure = make_counts(
        1160, 170, 160, 110
    )  # p_fine = 0.0059 of 1,600 tasks: enough of f, not of f squared
    assert look(sure)["standing"] == "undecided", "0.0059 / (1/4)^2 is not significant"
    assert look(sure, last=True)["standing"] == "fine", "with all of alpha it is"
    assert look(sure, {"spent": 0.9}, last=True)["standing"] == "fine", "1 - 0.9^2 of it is left"
    assert look(sure, {"spent": 0.95}, last=True)["standing"] == "undecided", (
        "1 - 0.95^2 of it is left"
    )
    gain = make_counts(50, 5, 25, 20)  # p = 0.00016 for a release that is no better
    assert not look(gain)["better"], "0.00016 / (100/6400) is not significant"
    assert look(gain, last=True)["better"]
    assert not look(gain, {"spent": 0.9}, last=True)["better"]


def test_where_all_of_alpha_is_spent_nothing_falls() -> None:
    fall = make_counts(10, 80, 0, 10)
    assert look(fall, last=True)["standing"] == "fell"
    assert look(fall, {"spent": 1.0}, last=True)["standing"] == "undecided"


def test_a_fall_ends_it_while_others_are_open() -> None:
    counts = [make_counts(70, 10, 10, 10, "open"), make_counts(30, 60, 0, 10, "gone")]
    found = SEQUENTIAL.look([Evidence(item, "r0", last=False) for item in counts])
    assert open_environments(found) == ["open"]
    verdict = SEQUENTIAL.verdict(found)
    assert verdict is not None
    assert verdict.text.startswith("rejected: gone fell")


def test_what_was_found_fine_stays_as_it_was_and_counts_for_the_correction() -> None:
    fine = look(make_counts(1440, 80, 80, 0, "fine"))
    assert fine["standing"] == "fine"
    fall = Evidence(make_counts(1400, 100, 60, 40), "r0", last=True)  # p = 0.001
    alone = SEQUENTIAL.look([fall])
    many = {f"fine-{number}": fine for number in range(60)}
    among = SEQUENTIAL.look([fall], many)
    assert alone["acme-a"]["standing"] == "fell"
    assert among["acme-a"]["standing"] != "fell"
    assert {name: among[name] for name in many} == many


def test_fine_means_surely_less_than_tolerance_and_margin() -> None:
    counts = make_counts(2880, 160, 160, 0)
    assert look(counts)["standing"] == "fine"
    assert look(counts)["margin_points"] == 3.5
    assert look(make_counts(2800, 240, 160, 0))["standing"] != "fine", (
        "2.5 points lost, 0.6 points of error"
    )
    tight = replace(SEQUENTIAL, margin_points=0.1)
    assert tight.look([Evidence(counts, "r0", last=False)])["acme-a"]["standing"] == "undecided"


# pass^k.


def several(first: tuple[int, int, int, int], every: tuple[int, int, int, int]) -> PairedCounts:
    return PairedCounts("acme-a", False, *first, attempts=4, every_attempt=Outcomes(*every))


def test_a_loss_that_only_repeated_attempts_show_is_rejected() -> None:
    counts = several((80, 4, 4, 12), (30, 30, 4, 36))
    assert decide(make_gate(), make_counts(80, 4, 4, 12)).accepted
    verdict = decide(make_gate(), counts)
    assert not verdict.accepted
    assert "84 -> 84 of 100" in verdict.text
    assert "all 4 attempts 60 -> 34 of 100 (only reference 30, only candidate 4" in verdict.text
    assert verdict.environments["acme-a"]["every_attempt"]["fall_points"] == 26.0


def test_both_measures_must_be_fine_and_both_are_corrected_for() -> None:
    unsure = several((800, 10, 10, 180), (500, 60, 40, 400))
    assert (
        decide(make_gate(), make_counts(800, 10, 10, 180)).environments["acme-a"]["standing"]
        == "fine"
    )
    assert (
        decide(make_gate(margin_points=1.0, tolerance_points=1.0), unsure).environments["acme-a"][
            "standing"
        ]
        == "undecided"
    )
    fall = make_counts(
        40, 9, 1, 50
    )  # p = 0.0107: significant alone and as one of four, not as one of six
    others = [several((90, 2, 2, 6), (60, 2, 2, 36)), several((90, 2, 2, 6), (60, 2, 2, 36))]
    others = [replace(item, environment=f"acme-{number}") for number, item in enumerate(others)]
    assert not decide(make_gate(), fall, others[0]).accepted
    assert decide(make_gate(), fall, *others).accepted


# Pooling.


def test_pool_counts_a_node_once_and_names_the_environment() -> None:
    first, again = make_result("acme-a", "d1", 1, 2, 3, 4), make_result("acme-a", "d1", 9, 9, 9, 9)
    other = make_result("acme-a", "d2", 10, 20, 30, 40)
    empty = make_result("idle", "d3", 0, 0, 0, 0)
    pooled = pool([("a-1", [first, again]), ("b-2", [other, empty]), ("c-3", [])])
    assert pooled == [PairedCounts("acme-a", False, 11, 22, 33, 44, nodes=2)]
    assert pooled[0].total == 110


def test_the_same_tasks_measured_by_several_nodes_count_once() -> None:
    honest, liar = (
        make_result("public", "d", 50, 4, 1, 5, True),
        make_result("public", "d", 0, 55, 0, 5, True),
    )
    alone = pool([("a", [honest])])[0]
    assert pool([("a", [honest]), ("b", [honest]), ("c", [honest])]) == [replace(alone, nodes=3)]
    assert pool([("a", [honest]), ("b", [liar]), ("c", [honest])]) == [replace(alone, nodes=3)]
    # Three nodes that repeat one measurement are no stronger evidence than one.
    fall = make_result("public", "d", 40, 4, 0, 6)
    assert decide(make_gate(), *pool([(node, [fall]) for node in "abc"])).accepted


def test_one_node_cannot_declare_an_environment_an_anchor() -> None:
    pooled = pool(
        [
            ("a", [make_result("x", "1", 1, 0, 0, 0, anchor=True)]),
            ("b", [make_result("x", "2", 1, 0, 0, 0)]),
        ]
    )
    assert pooled[0].anchor is False


def test_every_attempt_is_pooled_where_all_made_the_same_number() -> None:
    counts = {
        "both_passed": 1,
        "only_reference_passed": 0,
        "only_candidate_passed": 1,
        "neither_passed": 8,
    }
    three = make_result("x", "1", 5, 1, 1, 3) | {"attempts": 3, "every_attempt": counts}
    again, one = three | {"tasks_digest": "2"}, make_result("x", "3", 5, 1, 1, 3)
    pooled = pool([("a", [three]), ("b", [again])])[0]
    assert (pooled.attempts, pooled.every_attempt, pooled.total) == (3, Outcomes(2, 0, 2, 16), 20)
    mixed = pool([("a", [three]), ("b", [one])])[0]
    assert (mixed.attempts, mixed.every_attempt, mixed.total) == (1, None, 20)
