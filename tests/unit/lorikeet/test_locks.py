"""A lock has one holder, and a killed holder holds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorikeet.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from lorikeet.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "x.lock"), pytest.raises(BlockingIOError), locked(tmp_path / "x.lock"):
        pass
    with locked(tmp_path / "x.lock"):
        pass


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), locked(path):
            pass
        holder.kill()
    with locked(path):
        pass
