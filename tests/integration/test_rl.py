"""A grpo round with the real vLLM: the quickstart's base model explores environment E, from its
verifier and through an agent that asks the node's endpoint.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import rl

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "quickstart"


AGENT = {"name": "agent-e", "factory": "tests.fakes.agents:CompanyAgent"}
WORLDS = {
    "verifier": rl.WORLDS["E"],
    "agent": replace(rl.WORLDS["E"], environment=AGENT),
}


@pytest.mark.parametrize("of", WORLDS)
def test_the_reward_rises_through_the_nodes_own_vllm(of: str) -> None:
    with tempfile.TemporaryDirectory(prefix="lk-") as folder:  # short enough for a socket path
        result = asyncio.run(rl.run(WORLDS[of], CACHE, 0, Path(folder), rounds=1, steps=12))
    (figures,) = result["rounds"]
    assert figures["reward_last"] > figures["reward_first"] + 0.2
    assert figures["held_out_policy"] > figures["held_out_start"]
    before, after = result["success"]
    assert after > before
