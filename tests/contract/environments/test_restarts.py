"""A worker that ends: the next one, the pause before it, and what dies with whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.environments import EnvironmentProcess, Task, verify_all
from edge_node.environments.process import STEADY_S
from edge_node.errors import EnvironmentFault
from edge_node.settings import EnvironmentSpec

ROOT = Path(__file__).resolve().parents[3]
WORDS = EnvironmentSpec(name="words", factory="tests.fakes.word_environment:NextWord")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def crashing(mended: Path, clock: Clock, kind: str = "crash") -> EnvironmentProcess:
    spec = EnvironmentSpec(
        name="acme",
        factory="tests.fakes.broken_environments:Verifying",
        options={"how": kind, "mended": str(mended)},
    )
    return EnvironmentProcess(spec, clock=clock)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def is_gone(pid: int) -> bool:
    """Ended; perhaps its new parent has not looked after it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def one_task(process: EnvironmentProcess) -> Task:
    (task,) = process.environment().tasks("train", count=1, seed=0)
    return task


@pytest.mark.parametrize("kind", ["crash", "nan"])
def test_the_pause_before_a_new_worker_doubles_and_it_works_again(
    tmp_path: Path, kind: str
) -> None:
    clock, mended = Clock(), tmp_path / "mended"
    with crashing(mended, clock, kind) as process:
        for pause_s in (1, 2, 4):
            task, environment = one_task(process), process.environment()
            with pytest.raises(EnvironmentFault) as first:
                environment.verify(task, "x")
            with pytest.raises(EnvironmentFault, match=rf"started again in {pause_s}\.0 s"):
                environment.verify(task, "x")
            with pytest.raises(EnvironmentFault, match="in verify"):  # it says why once more
                process.environment()
            assert process.pid is None
            assert "in verify" in str(first.value)
            clock.now += pause_s
        mended.touch()
        # The task is from a worker that is gone.
        assert environment.verify(task, "w-1").passed is False


def test_the_pause_is_short_again_after_a_worker_that_ran_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    with crashing(tmp_path / "mended", clock) as process:
        for runs_s, pause_s in ((0, 1), (0, 2), (STEADY_S + 1, 1)):
            process._ended(runs_s, "It ended.")
            with pytest.raises(EnvironmentFault, match=rf"It ended\. .* again in {pause_s}\.0 s"):
                process.environment()
            clock.now += pause_s


def test_all_calls_that_wait_get_the_reason_and_none_hangs(tmp_path: Path) -> None:
    with crashing(tmp_path / "mended", Clock()) as process:
        task, environment = one_task(process), process.environment()
        faults: list[EnvironmentFault] = []

        def verify() -> None:
            with pytest.raises(EnvironmentFault) as caught:
                environment.verify(task, "x")
            faults.append(caught.value)

        threads = [threading.Thread(target=verify) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(faults) == 8
        assert all("killed by SIGSEGV" in str(fault) for fault in faults)
        with pytest.raises(EnvironmentFault, match="killed by SIGSEGV"):
            verify_all(process, [(task, "x")] * 100)


def test_more_calls_than_the_link_holds_are_answered() -> None:
    with EnvironmentProcess(WORDS) as process:
        task = one_task(process)
        outcomes = verify_all(process, [(task, "x" * 20_000)] * 200)
        assert len(outcomes) == 200
        assert not any(outcome.passed for outcome in outcomes)


@pytest.mark.parametrize("how", ["hang", "leave"])
def test_a_hang_ends_also_a_call_that_cannot_be_sent(tmp_path: Path, how: str) -> None:
    spec = EnvironmentSpec(
        name="acme",
        factory="tests.fakes.broken_environments:Verifying",
        options={"how": how, "mended": str(tmp_path / "mended")},
        call_timeout_s=1,
    )
    with EnvironmentProcess(spec) as process:
        task, faults = one_task(process), []

        def verify() -> None:
            with pytest.raises(EnvironmentFault) as caught:
                verify_all(process, [(task, "x" * 100_000)] * 20)
            faults.append(str(caught.value))

        thread = threading.Thread(target=verify)
        thread.start()
        thread.join(20)
        assert len(faults) == 1
        assert "gave no answer to verify within 1 s" in faults[0]


def test_a_worker_that_was_killed_while_idle_is_replaced_unnoticed() -> None:
    with EnvironmentProcess(WORDS) as process:
        task, first = one_task(process), process.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: process.pid is None)
        assert not process.environment().verify(task, "x").passed
        assert process.pid not in (None, first)


def test_what_an_environment_started_ends_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    spec = EnvironmentSpec(
        name="acme",
        factory="tests.fakes.broken_environments:Starting",
        options={"pid_file": str(file)},
    )
    with EnvironmentProcess(spec) as process:
        process.start()
        started = int(file.read_text())
        assert not is_gone(started)
    until(lambda: is_gone(started))


def test_a_closed_one_is_not_asked_any_more() -> None:
    with EnvironmentProcess(WORDS) as process:
        environment, worker = process.environment(), process.pid
        assert worker is not None
    assert is_gone(worker)
    process.close()
    with pytest.raises(EnvironmentFault, match="not asked any more"):
        environment.tasks("train", count=1, seed=0)


LIMITED = """
import ctypes, resource
from edge_node.environments import EnvironmentProcess
from edge_node.settings import EnvironmentSpec
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
PR_CAPBSET_DROP, CAP_SYS_RESOURCE = 24, 24  # root's worker may not raise it either
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0)
spec = EnvironmentSpec(name="text", factory="tests.fakes.text_environment:Texts", memory_mb=2048)
with EnvironmentProcess(spec) as process:
    print(process.start())
"""


def test_a_node_with_less_memory_than_an_environment_may_have_loads_it() -> None:
    node = subprocess.run(
        [sys.executable, "-c", LIMITED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert node.stdout == "texts\n", node.stderr


PARENT = """
import json, sys, threading
from edge_node.environments import EnvironmentProcess
from edge_node.settings import EnvironmentSpec
process = EnvironmentProcess(EnvironmentSpec.model_validate_json(sys.argv[1]))
environment = process.environment()
(task,) = environment.tasks("train", count=1, seed=0)
if sys.argv[2] == "busy":
    threading.Thread(target=environment.verify, args=(task, "x"), daemon=True).start()
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_worker_dies_with_its_parent(tmp_path: Path, state: str) -> None:
    spec = {
        "name": "acme",
        "factory": "tests.fakes.broken_environments:Verifying",
        "options": {"how": "hang", "mended": str(tmp_path / "mended")},
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, json.dumps(spec), state],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert not is_gone(worker)
        parent.kill()
        until(lambda: is_gone(worker))
