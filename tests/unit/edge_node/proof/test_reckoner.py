"""The handle on the process that makes references: it starts, answers, ends, and dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from edge_node.proof.reckoner import Reckoner
from edge_node.proof.references import NoReference

PROGRAM = """
import json, os, sys, time
for line in sys.stdin:
    order = json.loads(line)
    if order.get("sleep"):
        time.sleep(60)
    if order.get("die"):
        os._exit(3)
    if order.get("problem"):
        print(json.dumps({"problem": "KeyError: no such module"}), flush=True)
        continue
    seen = [name for name in os.environ if name.startswith("EDGE_")]
    answer = {"order": order, "gpu": os.environ["CUDA_VISIBLE_DEVICES"], "edge": seen}
    print(json.dumps({"reference": answer}), flush=True)
"""


def make(**settings: float) -> Reckoner:
    return Reckoner(command=(sys.executable, "-c", PROGRAM), **settings)


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)


async def test_one_process_answers_many_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CENTRAL__JOIN_TOKEN", "secret")
    reckoner = make()
    for number in range(3):
        answer = await reckoner.ask({"number": number})
        assert answer == {"order": {"number": number}, "gpu": "", "edge": []}
    assert reckoner.starts == 1
    with pytest.raises(NoReference, match="no such module"):
        await reckoner.ask({"problem": True})
    await reckoner.ask({})
    pid = reckoner.pid
    assert pid is not None
    await reckoner.aclose()
    await gone(pid)


@pytest.mark.parametrize("order", [{"die": True}, {"sleep": True}])
async def test_one_that_ends_or_hangs_costs_one_reference(order: dict[str, bool]) -> None:
    reckoner = make(deadline_s=3 if "sleep" in order else 60)
    with pytest.raises(NoReference, match=r"ended with 3|within 3 s"):
        await reckoner.ask(order)
    await asyncio.sleep(0.05)
    assert (await reckoner.ask({}))["order"] == {}
    assert reckoner.starts == 2
    await reckoner.aclose()


async def test_an_order_that_is_given_up_answers_no_other() -> None:
    reckoner = make()
    await reckoner.ask({})
    asked = asyncio.create_task(reckoner.ask({"sleep": True}))
    await asyncio.sleep(0.05)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    assert (await reckoner.ask({"number": 2}))["order"] == {"number": 2}
    await reckoner.aclose()


async def test_it_ends_when_nobody_asks() -> None:
    reckoner = make(idle_s=0.05)
    await reckoner.ask({})
    pid = reckoner.pid
    assert pid is not None
    await gone(pid)
    assert (await reckoner.ask({}))["order"] == {}
    await reckoner.aclose()


async def test_one_that_is_killed_is_started_again() -> None:
    reckoner = make()
    await reckoner.ask({})
    pid = reckoner.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with suppress(NoReference):
        await reckoner.ask({})
    assert (await reckoner.ask({}))["order"] == {}
    await reckoner.aclose()
