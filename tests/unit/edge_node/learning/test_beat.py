"""How long a learner gave no sign of life, by the clock of the one who looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_node.learning import worker as workers
from edge_node.learning.beat import LOOK_S, SILENT_S, Beat, Silence
from edge_node.learning.worker import Worker
from edge_node.settings import EdgeSettings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def beat(tmp_path: Path) -> Beat:
    (tmp_path / "learning").mkdir()
    return Beat(tmp_path)


def look_for(silence: Silence, clock: Clock, seconds: float) -> float:
    """What the last look says, after looks at every LOOK_S."""
    found = 0.0
    for _ in range(int(seconds / LOOK_S)):
        clock.now += LOOK_S
        found = silence.look()
    return found


def test_silence_counts_from_the_last_touch(beat: Beat) -> None:
    clock = Clock()
    silence = Silence(beat, clock)
    assert look_for(silence, clock, 100) == 100, "a learner that never touches is silent too"
    beat.touch()
    assert look_for(silence, clock, 5) == 0
    assert look_for(silence, clock, SILENT_S) == SILENT_S


def test_a_touch_of_a_former_learner_is_no_sign_of_life(beat: Beat) -> None:
    beat.touch()
    clock = Clock()
    assert look_for(Silence(beat, clock), clock, 50) == 50


def test_a_wall_clock_that_goes_back_hides_no_touch(beat: Beat, tmp_path: Path) -> None:
    beat.touch()
    clock = Clock()
    silence = Silence(beat, clock)
    look_for(silence, clock, 50)
    os.utime(tmp_path / "learning" / "beat", (1, 1))
    assert look_for(silence, clock, 5) == 0


def test_a_supervisor_that_was_held_up_itself_blames_nobody(beat: Beat) -> None:
    clock = Clock()
    silence = Silence(beat, clock)
    clock.now += 3600
    assert silence.look() == 2 * LOOK_S


def test_an_idle_learner_beats_however_rarely_it_polls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EdgeSettings.model_validate(
        {"data_dir": tmp_path, "learning": {"poll_s": 2 * SILENT_S}}
    )
    worker, clock, silences = Worker(settings, "n-1"), Clock(), []
    silence = Silence(Beat(tmp_path), clock)

    def sleep(seconds: float) -> None:
        clock.now += seconds
        silences.append(silence.look())

    monkeypatch.setattr(workers.time, "monotonic", clock)
    monkeypatch.setattr(workers.time, "sleep", sleep)
    worker._rest(settings.learning.poll_s)
    assert len(silences) == 2 * SILENT_S / LOOK_S
    assert max(silences) <= 2 * LOOK_S


def test_a_learner_beats_as_soon_as_it_starts(tmp_path: Path) -> None:
    Worker(EdgeSettings(data_dir=tmp_path), "n-1")
    assert Beat(tmp_path).seen()
