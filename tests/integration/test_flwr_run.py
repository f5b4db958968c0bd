"""`flwr run` for real: SuperLink, Ray and 50 virtual nodes, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from central.journal import verify_journal

ROOT = Path(__file__).resolve().parents[2]
NODES = 50


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_virtual_nodes_train_merge_and_judge(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="`make test-slow` installs it")
    keys = (
        "rounds=2",
        "steps=4",
        "examples=20",
        "tasks=2",
        "strategy=FedAdam",
        'strategy-options={"eta": 0.01}',
    )
    command = [
        sys.executable,
        "-m",
        "examples.simulation.run",
        "--nodes",
        str(NODES),
        "--folder",
        str(tmp_path / "run"),
    ]
    for key in keys:
        command += ["--set", key]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1400, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["nodes"] == NODES
    assert [(one["trained"], one["failed"]) for one in report["rounds"]] == [(NODES, 0)] * 2
    assert set(report["rounds"][0]["after"]) == {"acme-a", "acme-b", "acme-c", "public"}
    assert "round 2/2: 50 of 50 nodes judged" in run.stdout
    assert (tmp_path / "run" / "plot.png").stat().st_size > 10_000
    state = verify_journal(f"sqlite:///{report['central']}/journal.db")
    assert len(state.nodes) == NODES
    assert len(state.updates) == 2 * NODES
    built = [release for release in state.releases.values() if release.manifest.version > 0]
    assert all(release.server_state for release in built)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left, "nothing of it runs on"
