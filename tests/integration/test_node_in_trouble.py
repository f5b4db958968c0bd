"""A real node in trouble: what both status commands say while it lasts and after it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_node.surroundings import LOW_DISK_BYTES
from tests.integration.harness import ROOT, Program, is_ready, wait_for

pytestmark = pytest.mark.slow


def status(node: Program) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code, and the problems by room."""
    command = [sys.executable, "-m", node.module, "status", "--json"]
    done = subprocess.run(
        command, env=node.environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, {problem["room"]: problem for problem in document["problems"]}


def children(node: Program, name: str) -> list[int]:
    """Processes of the supervisor with `name` in their command line."""
    assert node.process is not None
    found = Path(f"/proc/{node.process.pid}/task/{node.process.pid}/children").read_text().split()
    return [int(pid) for pid in found if name in Path(f"/proc/{pid}/cmdline").read_text()]


def test_trouble_is_said_while_it_lasts(central: Program, node: Program, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < LOW_DISK_BYTES:
        pytest.skip("this disk is nearly full, which is a problem of its own")
    url = f"http://127.0.0.1:{node.settings['EDGE_SERVING__PORT']}"
    wait_for("a ready node", lambda: is_ready(url), 180, tmp_path)
    wait_for("no problem", lambda: status(node) == (0, {}), 60, tmp_path)
    assert re.search(
        r"INFO edge_node\S+: Adapter loaded release=lorikeet@v0-",
        (tmp_path / "node/logs/vllm.log").read_text(),
    )

    # The learner is killed: the node says so, and central hears it.
    [learner] = children(node, "edge_node.learning.worker")
    os.kill(learner, signal.SIGKILL)
    wait_for("the learner's trouble", lambda: "learner" in status(node)[1], 30, tmp_path)
    code, problems = status(node)
    assert (code, "killed by SIGKILL" in problems["learner"]["text"]) == (7, True)
    assert problems["learner"]["since"]

    def told() -> list[str]:
        [row] = central.json("nodes")
        return [problem["room"] for problem in row["status"]["problems"]]

    wait_for("central to hear it", lambda: told() == ["learner"], 30, tmp_path)
    assert "Next: " in central.run("nodes")
    wait_for("the learner to be well", lambda: status(node) == (0, {}), 60, tmp_path)
    wait_for("central to hear that", lambda: told() == [], 30, tmp_path)

    # Central is gone, and comes back.
    central.kill()
    wait_for(
        "central's absence",
        lambda: status(node)[0] == 7 and "central" in status(node)[1],
        60,
        tmp_path,
    )
    assert node.run("status", "--live")
    central.start("serve")
    wait_for("its return", lambda: status(node) == (0, {}), 60, tmp_path)

    # vLLM is killed: not ready first, then ready and still to be watched, then well.
    [vllm] = children(node, "vllm")
    os.kill(vllm, signal.SIGKILL)
    wait_for(
        "vLLM's end", lambda: status(node)[0] == 1 and "serving" in status(node)[1], 30, tmp_path
    )
    wait_for("another vLLM", lambda: status(node)[0] == 7, 120, tmp_path)
    wait_for("vLLM to be well", lambda: status(node) == (0, {}), 300, tmp_path)
