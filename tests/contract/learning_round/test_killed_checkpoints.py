"""SIGKILL inside the write of a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.learning.training import TrainedRound
from tests.contract.learning_round.killed_rounds import METHODS, MOMENTS
from tests.contract.learning_round.test_grpo_keeping import assert_same

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workspaces as the kills left them."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.learning_round.killed_rounds", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    expected = [f"{method}-{moment} -9" for method in METHODS for moment in MOMENTS]
    assert done.stdout.splitlines() == expected, done.stderr
    return folder


@pytest.mark.parametrize(("method", "run"), METHODS.items())
def test_a_round_killed_in_a_checkpoint_goes_on_to_the_same_bytes(
    tmp_path: Path, killed: Path, method: str, run: Callable[[Path], TrainedRound]
) -> None:
    whole = run(tmp_path)
    for moment in MOMENTS:
        workspace = killed / f"{method}-{moment}"
        left = sorted(folder.name for folder in workspace.glob("checkpoint-?"))
        assert left == ["checkpoint-2", "checkpoint-4"]
        assert (workspace / "checkpoint-2/sealed.json").is_file()
        assert not (workspace / "checkpoint-4/sealed.json").is_file()
        assert_same(run(workspace), whole)
