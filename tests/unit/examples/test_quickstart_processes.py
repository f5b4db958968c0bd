from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from examples.quickstart import processes
from examples.quickstart.processes import (
    Child,
    ChildFailed,
    ProcessTable,
    child_environment,
    stop_recorded,
)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "RESTART_PAUSES_S", (0.0,))
    monkeypatch.setattr(processes, "POLL_S", 0.01)


def make_child(tmp_path: Path, code: str) -> Child:
    return Child("child", [sys.executable, "-S", "-c", code], {}, tmp_path / "child.log", tmp_path)


async def test_a_child_that_never_works_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    child = make_child(tmp_path, "print('no such model'); raise SystemExit(2)")
    with pytest.raises(ChildFailed, match=r"(?s)exit codes \[2, 2, 2, 2\].*no such model"):
        await child.run(ProcessTable(tmp_path / "processes.json"))


async def test_a_child_that_worked_is_started_again(tmp_path: Path) -> None:
    child = make_child(tmp_path, "import time; time.sleep(60)")
    child.was_ready = True
    table = ProcessTable(tmp_path / "processes.json")
    running = asyncio.create_task(child.run(table))
    seen: list[int] = []
    for _ in range(processes.EARLY_DEATHS + 1):
        async with asyncio.timeout(10):
            while child.pid is None or child.pid in seen:
                await asyncio.sleep(0.01)
        seen.append(child.pid)
        psutil.Process(child.pid).kill()
    async with asyncio.timeout(10):
        while child.restarts < len(seen):
            await asyncio.sleep(0.01)
    await child.stop()
    await running
    assert child.restarts == len(seen)
    assert child.exit_codes == [-9] * len(seen)


async def test_a_stopped_child_stays_stopped(tmp_path: Path) -> None:
    child = make_child(tmp_path, "import time; time.sleep(60)")
    running = asyncio.create_task(child.run(ProcessTable(tmp_path / "processes.json")))
    async with asyncio.timeout(10):
        while child.pid is None:
            await asyncio.sleep(0.01)
    await child.stop()
    await running
    assert child.pid is None
    assert child.restarts == 0


def test_what_an_earlier_run_left_is_stopped_and_a_stranger_is_not(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    sleepers = [
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
        for _ in range(2)
    ]
    try:
        started = [psutil.Process(sleeper.pid).create_time() for sleeper in sleepers]
        rows = [
            {"name": "ours", "pid": sleepers[0].pid, "started": started[0]},
            {"name": "reused", "pid": sleepers[1].pid, "started": started[1] - 3600},
            {"name": "gone", "pid": 2**22 + 1, "started": 1.0},
        ]
        path.write_text(json.dumps(rows))
        assert stop_recorded(path) == ["ours"]
        assert sleepers[0].poll() is not None
        assert sleepers[1].poll() is None
        assert not path.exists()
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_nothing_recorded(tmp_path: Path) -> None:
    assert stop_recorded(tmp_path / "processes.json") == []


def test_settings_of_another_node_do_not_leak(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_SERVING__PORT", "1")
    monkeypatch.setenv("central_data_dir", "x")
    environment = child_environment({"EDGE_NODE_NAME": "a"}, tmp_path)
    settings = {
        key: value
        for key, value in environment.items()
        if key.upper().startswith(("EDGE_", "CENTRAL_"))
    }
    assert settings == {"EDGE_NODE_NAME": "a"}
    assert environment["PYTHONPATH"] == str(tmp_path)
