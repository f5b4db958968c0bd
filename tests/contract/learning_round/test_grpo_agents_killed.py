"""kill -9 inside a round on agents: the sessions that it left open are no trouble to the next one.

A real learner process and real environment processes; the node's vLLM is a tiny sampler.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_node.learning.plans import plan_round
from edge_node.settings import EdgeSettings
from protos.manifest import sha256_hex
from tests.contract.learning_round.test_grpo_agents import agents, node
from tests.fakes.identity import NODE_ID
from tests.fakes.node_data import activate
from tests.fakes.policy_vllm import sampling_vllm
from tests.fakes.tiny_model import tiny_adapter

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[3]
STEPS, SEALED = 4, "checkpoint-2/sealed.json"


def learner(folder: Path, release: Path, workspace: Path) -> subprocess.Popen[bytes]:
    files = [folder / "settings.json", folder / "plan.json", release, workspace]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.explorer", *map(str, files)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )


def test_a_killed_round_on_agents_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    settings = node(tmp_path, agents(turns=2), prompts=4, samples=4, steps=STEPS)
    fields = settings.model_dump()
    fields["learning"]["checkpoint_steps"] = 1
    settings = EdgeSettings.model_validate(fields)
    release = activate(settings, tiny_adapter(3, rank=2, strength=0.2), version=1)
    plan = plan_round(
        settings.learning, number=1, node_id=NODE_ID, release=release, cursor=0, max_rank=None,
        method="grpo", explored=["desk"],
    )  # fmt: skip
    (tmp_path / "settings.json").write_text(settings.model_dump_json())
    (tmp_path / "plan.json").write_bytes(plan.to_bytes())
    folder = settings.data_dir / "releases" / "versions" / release.digest
    digests, left_open = [], 0
    with sampling_vllm(settings) as (_, gateway):
        for name, kill in (("whole", False), ("killed", True), ("killed", False)):
            workspace = tmp_path / name
            workspace.mkdir(exist_ok=True)
            child = learner(tmp_path, folder, workspace)
            while child.poll() is None and not (
                kill and (workspace / SEALED).is_file() and gateway.sessions._open
            ):
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
            assert child.wait(30) == (-signal.SIGKILL if kill else 0)
            left_open = max(left_open, len(gateway.sessions._open))
            if not kill:
                factors = workspace / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
                digests.append(sha256_hex(factors.read_bytes()))
    assert left_open, "it was killed while agents ran"
    whole, resumed = digests
    assert resumed == whole
