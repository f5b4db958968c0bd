"""Turns: first come, first served, and whoever is slow loses its own only."""

from __future__ import annotations

import asyncio

import pytest

from central.intake import turns
from central.intake.turns import Turn


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 60.0)


async def started(turn: Turn, order: list[Turn]) -> asyncio.Task[None]:
    """`turn` waits, or has begun."""

    async def begin() -> None:
        await turn.begin()
        order.append(turn)

    task = asyncio.create_task(begin())
    await asyncio.sleep(0)
    return task


@pytest.mark.usefixtures("patient")
async def test_so_many_at_a_time_in_the_order_of_asking() -> None:
    shared, order = asyncio.Semaphore(2), list[Turn]()
    all_turns = [Turn(shared) for _ in range(4)]
    tasks = [await started(turn, order) for turn in all_turns]
    assert order == all_turns[:2]
    await all_turns[0].begin()  # within its turn nobody waits
    for turn in all_turns[:2]:
        turn.end()
        turn.end()  # gives back no second one
    await asyncio.gather(*tasks)
    assert order == all_turns
    assert shared.locked()


@pytest.mark.usefixtures("patient")
async def test_a_turn_that_expires_is_given_back_once_and_its_upload_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 0.01)
    shared = asyncio.Semaphore(2)
    slow, other, third, fourth = (Turn(shared) for _ in range(4))
    await slow.begin()
    monkeypatch.setattr(turns, "LIMIT_S", 60.0)
    await other.begin()
    await third.begin()  # after the slow one's limit
    await slow.begin()  # no new turn for the same window
    slow.end()
    assert shared.locked()
    third.end()
    await fourth.begin()
    assert shared.locked()


@pytest.mark.usefixtures("patient")
async def test_who_stops_waiting_takes_no_turn() -> None:
    shared, order = asyncio.Semaphore(2), list[Turn]()
    holders = [Turn(shared), Turn(shared)]
    for turn in holders:
        await turn.begin()
    gone = Turn(shared)
    task = await started(gone, order)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gone.end()
    assert shared.locked()
    for turn in holders:
        turn.end()
    for turn in (Turn(shared), Turn(shared)):
        await asyncio.wait_for(turn.begin(), 1)


async def test_a_turn_whose_window_is_full_does_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LIMIT_S", 0.01)
    shared = asyncio.Semaphore(1)
    turn = Turn(shared)
    await turn.begin()
    turn.keep()
    await asyncio.sleep(0.05)
    assert shared.locked()
    turn.end()
    assert not shared.locked()
    await turn.begin()  # the next one expires again
    await asyncio.sleep(0.05)
    assert not shared.locked()
    turn.keep()  # too late: it changes nothing
    turn.end()
    await turn.begin()
    assert shared.locked()
