"""The supervisor's sign of life."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from edge_node.errors import EdgeError
from edge_node.heartbeat import FILE_NAME, SILENCE_S, beat, check_alive


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
