"""A learner that hangs is noticed, ended and started again: a real child, stopped in a round."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.learning import LearnerProcess
from edge_node.outbox import Outbox
from edge_node.problems import Problem, Problems
from edge_node.settings import EdgeSettings
from tests.fakes.node_data import activate, as_environment, make_node, meet
from tests.fakes.tiny_model import tiny_adapter

ROOT = Path(__file__).resolve().parents[2]


async def until(seen: Callable[[], object], limit_s: float = 120) -> None:
    async with asyncio.timeout(limit_s):
        while not seen():
            await asyncio.sleep(0.005)


def trouble(settings: EdgeSettings) -> list[Problem]:
    return [p for p in Problems(settings.data_dir).current() if p.room == "learner"]


async def test_a_learner_that_hangs_in_a_round_is_ended_and_the_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = make_node(tmp_path / "node", steps=60, checkpoint_steps=5)
    meet(settings, activate(settings, tiny_adapter(5), version=1).label, 30)
    for name, value in as_environment(settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("edge_node.learning.process.LOOK_S", 0.05)
    monkeypatch.setattr("edge_node.learning.process.STOP_S", 0.5)
    learner = LearnerProcess(settings, first_pause_s=0.01)
    running = asyncio.create_task(learner.run())
    rounds = settings.data_dir / "learning/rounds"
    await until(lambda: list(rounds.glob("*/checkpoint-*/sealed.json")))
    first = learner.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    assert not Outbox(settings.data_dir / "outbox", "auto").list(), "stopped in the round"
    learner.silent_after_s = 0.3
    await until(lambda: trouble(settings))
    learner.silent_after_s = 600
    (problem,) = trouble(settings)
    assert "no sign of life for 0.3 s" in problem.text
    assert "memory" not in problem.text + problem.next_step
    assert "EDGE_ENVIRONMENTS" in problem.next_step
    await until(lambda: learner.pid not in (None, first))
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert trouble(settings) == [problem], "how it was ended does not take the place of why"
    await until(lambda: Outbox(settings.data_dir / "outbox", "auto").list())
    await learner.aclose()
    await running
    assert "round resumes" in capfd.readouterr().err
    assert learner.starts == 2
