"""The supervisor's sign of life."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from edge_node.errors import EdgeError
from edge_node.heartbeat import FILE_NAME, SILENCE_S, beat, check_alive
from edge_node.problems import Problems


async def test_a_beat_is_seen(tmp_path: Path) -> None:
    task = asyncio.create_task(beat(tmp_path))
    await asyncio.sleep(0)
    task.cancel()
    assert check_alive(tmp_path) < SILENCE_S


def test_silence_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgeError, match="No supervisor has run"):
        check_alive(tmp_path)
    (tmp_path / FILE_NAME).touch()
    os.utime(tmp_path / FILE_NAME, (1000, 1000))
    assert check_alive(tmp_path, now=1000 + SILENCE_S) == SILENCE_S
    with pytest.raises(EdgeError, match="last alive 61 s ago"):
        check_alive(tmp_path, now=1061)


async def test_a_sign_of_life_that_cannot_be_written_is_a_problem_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_node.heartbeat.INTERVAL_S", 0.01)
    monkeypatch.setattr("edge_node.heartbeat.FILE_NAME", "absent/alive")
    problems = Problems(tmp_path)
    task = asyncio.create_task(beat(tmp_path))
    async with asyncio.timeout(5):
        while [problem.room for problem in problems.current()] != ["heartbeat"]:
            await asyncio.sleep(0.01)
        assert "EDGE_DATA_DIR" in problems.current()[0].next_step
        (tmp_path / "absent").mkdir()
        while problems.current():
            await asyncio.sleep(0.01)
    task.cancel()
