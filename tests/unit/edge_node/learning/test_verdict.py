"""What the local gate makes of its counts."""

from __future__ import annotations

from typing import Any

import pytest

from edge_node.learning.verdict import Compared, Verdict, p_fall, read_result
from edge_node.round_settings import GateSettings
from protos.releases.v1.releases_pb2 import EnvironmentResult, PairedLikelihood, PairedOutcomes

SETTINGS = GateSettings()


def result(both: int, worse: int, better: int, neither: int, **more: Any) -> EnvironmentResult:
    counts = {
        "both_passed": both,
        "only_reference_passed": worse,
        "only_candidate_passed": better,
        "neither_passed": neither,
    }
    return EnvironmentResult(environment="desk", **counts, **more)


def texts(differences: list[float], before: float = -3.0) -> Compared:
    count = len(differences)
    likelihood = PairedLikelihood(
        documents=count, tokens=9 * count, reference_mean=before,
        candidate_mean=before + sum(differences) / count, difference_sum=sum(differences),
        difference_square_sum=sum(one * one for one in differences),
    )  # fmt: skip
    return read_result(EnvironmentResult(environment="english", anchor=True, likelihood=likelihood))


@pytest.mark.parametrize(
    ("worse", "better", "p"),
    [(0, 0, 1.0), (5, 0, 1 / 32), (0, 5, 1.0), (4, 1, 6 / 32), (7, 0, 1 / 128)],
)
def test_mcnemars_exact_test(worse: int, better: int, p: float) -> None:
    assert p_fall(worse, better) == pytest.approx(p)


def test_a_fall_is_said_in_counts() -> None:
    found = read_result(result(10, 9, 1, 12))
    assert (found.tasks, found.start, found.policy) == (32, 19 / 32, 11 / 32)
    assert Verdict([found], 0).falls(SETTINGS) == [found]
    assert str(found) == (
        "environment desk: of 32 held-out tasks 19 were passed and now 11 are (1 better, 9 worse)"
    )
    every = read_result(
        EnvironmentResult(
            environment="words", anchor=True,
            every_attempt=PairedOutcomes(both_passed=2, only_reference_passed=7, neither_passed=1),
        ),
        every=True,
    )  # fmt: skip
    assert str(every) == (
        "anchor words: of 10 held-out tasks 9 were passed by every answer and now 2 are (0 better, "
        "7 worse)"
    )


def test_what_may_be_chance_or_is_small_is_no_fall() -> None:
    chance = read_result(result(20, 4, 0, 8))  # p = 1/16
    small = read_result(result(900, 40, 5, 55))  # 3.5 points of 1,000 tasks
    assert small.p_fall < 1e-6
    assert not Verdict([chance], 0).falls(SETTINGS)
    assert not Verdict([small], 0).falls(SETTINGS)
    assert Verdict([small], 0).falls(GateSettings(tolerance_points=3)) == [small]


def test_more_comparisons_ask_for_more_evidence() -> None:
    five, same = read_result(result(20, 5, 0, 7)), read_result(result(20, 0, 0, 12))
    assert Verdict([five], 0).falls(SETTINGS) == [five]
    assert not Verdict([five, same], 0).falls(SETTINGS)


def test_texts_fall_by_nats() -> None:
    fell, noisy, small = texts([-0.2, -0.3] * 8), texts([-4.0, 3.5] * 4), texts([-0.09, -0.08] * 9)
    assert Verdict([fell, noisy, small], 0).falls(SETTINGS) == [fell]
    assert str(fell) == "anchor english: 16 texts had -3.000 nats a token and now have -3.250"
    assert texts([-0.5]).p_fall == 0, "a single text has no spread"
    assert texts([0.0, 0.0]).p_fall == 1


def test_the_manifest_has_sums_over_own_environments_anchors_and_texts() -> None:
    every = PairedOutcomes(both_passed=3, only_reference_passed=1, neither_passed=6)
    sampled = read_result(EnvironmentResult(environment="b", every_attempt=every), every=True)
    own = [read_result(result(5, 2, 1, 2)), read_result(result(0, 0, 10, 0)), sampled]
    anchor = read_result(result(4, 0, 0, 0, anchor=True))
    metrics = Verdict([*own, anchor, texts([-0.1])], 2).metrics()
    assert metrics["gate_unjudged"] == 2
    assert [metrics[f"held_out_{name}"] for name in ("tasks", "better", "worse")] == [20, 11, 2]
    assert (metrics["held_out_start"], metrics["held_out_policy"]) == (7 / 20, 16 / 20)
    assert (metrics["held_out_every_start"], metrics["held_out_every_policy"]) == (0.4, 0.3)
    assert (metrics["anchor_tasks"], metrics["anchor_policy"]) == (4, 1)
    assert metrics["texts_policy"] == pytest.approx(-3.1)
    assert not any(name.startswith("anchor_every") for name in metrics)
