"""Error rates of the gate by simulation; central/evaluation/README.md states these figures and what they mean."""

from __future__ import annotations

import pytest

from central.settings import GateSettings
from tests.unit.central.evaluation.simulation import DEFAULTS, drift, rates

ONE_LOOK = GateSettings(max_tasks=DEFAULTS.tasks)


@pytest.mark.parametrize("trials", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_neutral_candidate_is_rejected_in_at_most_one_of_twenty_cases(trials: int) -> None:
    seen = rates(trials)
    assert seen.rejected <= 0.05
    assert seen.tasks < 1700


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
def test_drift_above_five_points_is_rarer_than_one_in_fifty(step_points: float, environments: int) -> None:
    points = [drift(step_points=step_points, environments=environments, seed=seed).points for seed in range(100)]
    assert sum(value > 5 for value in points) <= 2


def test_one_look_cannot_have_it_all() -> None:
    """A hundred tasks do not carry that much evidence; the README says so, and this would notice if it changed."""
    assert rates(100, settings=ONE_LOOK).rejected <= 0.05
    assert rates(100, loss=0.1, settings=ONE_LOOK).rejected < 0.5
