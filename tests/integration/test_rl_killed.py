"""kill -9 inside a grpo round with the real vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import rl
from examples.ports import free_port
from examples.quickstart.model import build_base
from protos.base import read_base_model
from protos.lora import LoraTensors
from protos.manifest import sha256_hex
from tests.integration.test_rl import WORLDS

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "quickstart"
STEPS, SEALED = 4, "checkpoint-2/sealed.json"


async def rounds(world: rl.World, folder: Path, cache: Path) -> list[str]:
    """The digests of the factors of a round that ran through, and of the same one killed."""
    path = await asyncio.to_thread(build_base, cache)
    base = read_base_model(path)
    settings = rl.settings_for(world, folder, path, 0, free_port(), steps=STEPS, prompts=6)
    learning = settings.learning.model_copy(update={"checkpoint_steps": 1})
    settings = settings.model_copy(update={"learning": learning})
    async with rl.serving(settings, base) as control:
        releases = rl.Releases(settings, base, control)
        await releases.add(LoraTensors())
        (folder / "settings.json").write_text(settings.model_dump_json())
        (folder / "plan.json").write_bytes(releases.plan(1).to_bytes())
        digests = []
        for name, kill in (("whole", False), ("killed", True), ("killed", False)):
            workspace = folder / name
            workspace.mkdir(exist_ok=True)
            child = explorer(folder, releases.folder, workspace)
            try:
                while child.poll() is None and not (kill and (workspace / SEALED).is_file()):
                    await asyncio.sleep(0.02)
            finally:
                child.send_signal(signal.SIGKILL)
                status = child.wait(30)
            assert status == (-signal.SIGKILL if kill else 0)
            if not kill:
                factors = workspace / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
                digests.append(sha256_hex(factors.read_bytes()))
    return digests


def explorer(folder: Path, release: Path, workspace: Path) -> subprocess.Popen[bytes]:
    files = [folder / "settings.json", folder / "plan.json", release, workspace]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.explorer", *map(str, files)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )


@pytest.mark.parametrize("of", WORLDS)
def test_a_killed_round_goes_on_to_the_same_bytes(of: str) -> None:
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:  # short enough for a socket path
        whole, resumed = asyncio.run(rounds(WORLDS[of], Path(folder), CACHE))
    assert resumed == whole
