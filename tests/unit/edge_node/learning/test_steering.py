"""A round waits for the users, but not for ever, and hears an operator meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_node.errors import ServingError
from edge_node.learning import steering as steerings
from edge_node.learning.orders import Orders, RoundCancelled
from edge_node.learning.records import RoundStore
from edge_node.learning.reports import Progress, read_progress, report_folder
from edge_node.learning.steering import NodeSteering, UserLimits
from edge_node.serving import ControlState
from edge_node.settings import EdgeSettings
from tests.unit.edge_node.learning.test_records import make_plan

QUIET = ControlState(
    alias="lorikeet", base="base@0", target="lorikeet@v1", loaded={}, in_flight={}, captured=0,
    lost=0, skipped=0, draining=False, not_ready=None, silent_s=0.0, first_token_s=0.0,
    problems=[],
)  # fmt: skip
BUSY = replace(QUIET, in_flight={"lorikeet@v1": 3, "policy/r1.ab@3": 9}, first_token_s=2.0)


@pytest.mark.parametrize(
    ("in_flight", "first_token_s", "passed"),
    [(None, None, False), (3, None, False), (2, None, True), (None, 2.0, False), (9, 1.9, True)],
)
def test_a_limit_is_passed_by_users_alone(
    in_flight: int | None, first_token_s: float | None, passed: bool
) -> None:
    assert UserLimits(in_flight, first_token_s).are_passed(BUSY) is passed
    assert not UserLimits(in_flight, first_token_s).are_passed(QUIET)


class Time:
    """Passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at_sleep()


class Vllm:
    def __init__(self, state: ControlState | None) -> None:
        self.now = state
        self.asked = 0

    async def state(self) -> ControlState:
        self.asked += 1
        if self.now is None:
            raise ServingError("vLLM is away.")
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(steerings, "time", time)
    return time


def steer(
    data_dir: Path, vllm: Vllm, **learning: Any
) -> tuple[NodeSteering, RoundStore, list[int]]:
    settings = EdgeSettings.model_validate({"data_dir": data_dir, "learning": learning})
    rounds = RoundStore(data_dir / "learning")
    plan = make_plan(1)
    rounds.begin(plan)
    beats: list[int] = []
    steering = NodeSteering(settings, rounds, plan, lambda: beats.append(1))
    steering._control = vllm  # type: ignore[assignment]
    steering.tell(Progress(step=1, steps=2, seconds=0.1, entries=[{"step": 1, "loss": 1.0}]))
    return steering, rounds, beats


def test_a_step_waits_until_the_users_are_served(tmp_path: Path, time: Time) -> None:
    vllm = Vllm(BUSY)
    steering, _, beats = steer(tmp_path, vllm, yield_in_flight=2)
    round_id = make_plan(1).round_id
    said: list[str] = []

    def later() -> None:
        progress = read_progress(tmp_path, round_id)
        assert progress is not None
        said.append(progress.waits)
        vllm.now = BUSY if time.now < 3 else QUIET

    time.at_sleep = later
    steering.let_users_pass()
    assert time.now == 3
    assert set(said) == {"users' requests"}
    assert len(beats) == 6, "a learner that waits is alive"
    progress = read_progress(tmp_path, round_id)
    assert progress is not None
    assert progress.waits == ""


def test_a_step_waits_no_longer_than_its_limit(tmp_path: Path, time: Time) -> None:
    steering, _, _ = steer(tmp_path, Vllm(BUSY), yield_first_token_s=1, yield_at_most_s=7)
    steering.let_users_pass()
    assert time.now == 7


def test_a_vllm_that_is_away_holds_nobody_up(tmp_path: Path, time: Time) -> None:
    steering, _, _ = steer(tmp_path, Vllm(None), yield_in_flight=0)
    steering.let_users_pass()
    assert time.now == 0


def test_without_a_limit_nobody_is_asked(tmp_path: Path, time: Time) -> None:
    vllm = Vllm(BUSY)
    steering, _, _ = steer(tmp_path, vllm)
    steering.let_users_pass()
    assert (time.now, vllm.asked) == (0, 0)


def test_a_round_that_waits_hears_an_operator(tmp_path: Path, time: Time) -> None:
    steering, rounds, _ = steer(tmp_path, Vllm(BUSY), yield_in_flight=0)
    time.at_sleep = lambda: Orders(rounds).cancel(make_plan(1), lambda _: False)
    with pytest.raises(RoundCancelled):
        steering.let_users_pass()
    assert time.now == steerings.LOOK_S


def test_outside_of_its_windows_a_round_pauses_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steering, _, _ = steer(tmp_path, Vllm(QUIET), schedule=["22:00-06:00"])
    opened = True
    monkeypatch.setattr("edge_node.schedule.is_open", lambda windows: opened)
    assert not steering.must_pause()
    opened = False
    assert steering.must_pause()
    steering.pauses()
    progress = read_progress(tmp_path, make_plan(1).round_id)
    assert progress is not None
    assert progress.waits == "a window of EDGE_LEARNING__SCHEDULE"


def test_only_where_it_is_wanted_a_round_has_a_folder_for_tensorboard(tmp_path: Path) -> None:
    steering, _, _ = steer(tmp_path / "a", Vllm(QUIET))
    assert steering.tensorboard is None
    steering, _, _ = steer(tmp_path / "b", Vllm(QUIET), tensorboard=True)
    folder = report_folder(tmp_path / "b", make_plan(1).round_id)
    assert steering.tensorboard == folder / "tensorboard"
