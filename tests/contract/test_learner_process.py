"""The learner as the supervisor runs it: a real child process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.learning import LearnerProcess
from edge_node.problems import Problem, Problems
from edge_node.settings import EdgeSettings
from protos.lora import LoraTensors
from tests.fakes.node_data import activate, as_environment, make_node

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings' data directory, where problems are kept, is relative."""
    monkeypatch.chdir(tmp_path)


def trouble() -> Problem | None:
    return next(
        (
            problem
            for problem in Problems(EdgeSettings().data_dir).current()
            if problem.room == "learner"
        ),
        None,
    )


async def until(seen: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not seen():
            await asyncio.sleep(0.01)


class Sleeper(LearnerProcess):
    def command(self) -> list[str]:
        return ["sleep", "600"]


async def pid_other_than(learner: LearnerProcess, old: int | None) -> int:
    async with asyncio.timeout(10):
        while learner.pid is None or learner.pid == old:
            await asyncio.sleep(0.01)
    return learner.pid


class Unstartable(LearnerProcess):
    tries = 0

    def command(self) -> list[str]:
        self.tries += 1
        return ["sleep", "600"] if self.tries > 2 else ["/no/such/program"]


async def test_a_learner_that_cannot_be_started_is_tried_again() -> None:
    learner = Unstartable(EdgeSettings(), first_pause_s=0.01)
    running = asyncio.create_task(learner.run())
    await pid_other_than(learner, None)
    assert (learner.tries, learner.starts) == (3, 1)
    await learner.aclose()
    await running


async def test_killed_learner_is_started_again_and_aclose_ends_it() -> None:
    learner = Sleeper(EdgeSettings(), first_pause_s=0.01)
    running = asyncio.create_task(learner.run())
    first = await pid_other_than(learner, None)
    os.kill(first, signal.SIGKILL)
    second = await pid_other_than(learner, first)
    await learner.aclose()
    await learner.aclose()
    await asyncio.wait_for(running, 5)
    assert learner.pid is None
    assert learner.starts == 2
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


class Failing(LearnerProcess):
    """Ends as the worker does that cannot read its active release; then runs on."""

    broken = True
    line = (
        "learner: The active release in active.json cannot be read. Restart the node's supervisor."
    )

    def command(self) -> list[str]:
        words = "; ".join(
            f"print({line!r}, file=sys.stderr)" for line in ("a customer wrote this", self.line)
        )
        return (
            [sys.executable, "-c", f"import sys; {words}; sys.exit(5)"]
            if self.broken
            else ["sleep", "600"]
        )


async def test_a_learner_that_keeps_ending_is_a_problem_until_one_runs_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edge_node.learning.process.calm_s", lambda ran_s, last_s=0.0: 0.3)
    Problems(EdgeSettings().data_dir).report("learner", "Left by a former supervisor.", "")
    learner = Failing(EdgeSettings(), first_pause_s=0.01)
    running = asyncio.create_task(learner.run())
    await until(
        lambda: "The active release in active.json cannot be read" in getattr(trouble(), "text", "")
    )
    problem = trouble()
    assert problem is not None
    assert "customer" not in problem.text
    assert "edge-node serve" in problem.next_step
    learner.broken = False
    await until(lambda: trouble() is None)
    await learner.aclose()
    await running
    assert Failing.line in capfd.readouterr().err, "what the learner prints is not swallowed"


async def test_a_learner_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Sleeper(EdgeSettings(), first_pause_s=0.01)
    running = asyncio.create_task(learner.run())
    os.kill(await pid_other_than(learner, None), signal.SIGKILL)
    await until(lambda: trouble() is not None)
    await learner.aclose()
    await running
    problem = trouble()
    assert problem is not None
    assert "killed by SIGKILL" in problem.text
    assert "memory" in problem.next_step


async def test_learning_switched_off_starts_nothing() -> None:
    learner = Sleeper(EdgeSettings.model_validate({"learning": {"enabled": False}}))
    running = asyncio.create_task(learner.run())
    await asyncio.sleep(0)
    assert (learner.pid, learner.starts) == (None, 0)
    await learner.aclose()
    await asyncio.wait_for(running, 5)


def test_worker_idles_and_dies_with_its_supervisor(tmp_path: Path) -> None:
    settings = make_node(tmp_path)
    activate(settings, LoraTensors(), version=0)
    code = (
        "import asyncio\n"
        "from edge_node.learning import LearnerProcess\n"
        "from edge_node.settings import load_settings\n"
        "async def main():\n"
        "    learner = LearnerProcess(load_settings())\n"
        "    task = asyncio.create_task(learner.run())\n"
        "    while learner.pid is None: await asyncio.sleep(0.01)\n"
        "    print(learner.pid, flush=True)\n"
        "    await task\n"
        "asyncio.run(main())\n"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    supervisor = subprocess.Popen(
        [sys.executable, "-c", code],
        env=clean | as_environment(settings) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    pid = int(supervisor.stdout.readline())
    opened = tmp_path / "learning/rounds.db"
    wait_until(lambda: opened.exists(), "the worker opens its records")
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "libtorch" not in maps, "an idle learner holds no torch"
    supervisor.kill()
    supervisor.wait(10)
    supervisor.stdout.close()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the worker dies with its supervisor")


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [({"EDGE_LEARNING__STEPS": "many"}, 2, "EDGE_LEARNING__STEPS"), ({}, 3, "edge-node enroll")],
)
def test_unusable_node_gets_one_line_and_an_exit_code(
    tmp_path: Path, change: dict[str, str], code: int, text: str
) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EDGE_")}
    result = subprocess.run(
        [sys.executable, "-m", "edge_node.learning.worker"],
        env=clean | {"EDGE_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)} | change,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def wait_until(condition: object, what: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
