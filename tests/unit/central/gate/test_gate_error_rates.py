"""Error rates of the gate by simulation; docs/gate.md states these figures and what they
mean.
"""

from __future__ import annotations

import pytest

from central.settings import GateSettings
from tests.unit.central.gate.simulation import DEFAULTS, chances, drift, rates

ONE_LOOK = GateSettings(max_tasks=DEFAULTS.tasks)


@pytest.mark.parametrize("trials", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_neutral_candidate_is_rejected_in_at_most_one_of_twenty_cases(trials: int) -> None:
    seen = rates(trials)
    assert seen.rejected <= 0.05
    assert seen.tasks < 2400


@pytest.mark.parametrize("trials", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_a_ten_point_loss_in_one_of_thirty_environments_is_caught(trials: int) -> None:
    seen = rates(trials, loss=0.1)
    assert seen.rejected >= 0.9
    assert seen.tasks_of_first < 900


@pytest.mark.parametrize("step_points", [0.25, 1.0])
def test_fifty_slightly_worse_candidates_drift_at_most_five_points(step_points: float) -> None:
    assert max(drift(step_points=step_points, seed=seed).points for seed in range(8)) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("environments", [3, 30])
@pytest.mark.parametrize("step_points", [0.25, 0.5, 1.0])
def test_no_drift_above_five_points_in_1200_runs(step_points: float, environments: int) -> None:
    seeds = range(1000, 1200)
    assert (
        max(
            drift(step_points=step_points, environments=environments, seed=seed).points
            for seed in seeds
        )
        <= 5
    )


def test_fifty_candidates_drift_above_five_points_in_less_than_one_run_of_a_hundred() -> None:
    """Such a run must accept a candidate five points below its high-water release, or take one that
    is no better for better.
    """
    assert 50 * (chances(0.05).accepted + chances(0.0).better) <= 0.01


def test_one_look_cannot_have_it_all() -> None:
    """A hundred tasks do not carry that much evidence; the README says so, and this would notice if
    it changed.
    """
    assert rates(100, settings=ONE_LOOK).rejected <= 0.05
    assert rates(100, loss=0.1, settings=ONE_LOOK).rejected < 0.5
