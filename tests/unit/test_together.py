from __future__ import annotations

import asyncio

import pytest

from lorikeet.together import together


async def test_results_are_in_the_order_of_the_steps() -> None:
    async def after(pause_s: float) -> float:
        await asyncio.sleep(pause_s)
        return pause_s

    assert await together(after(pause_s) for pause_s in (0.02, 0.0, 0.01)) == [0.02, 0.0, 0.01]


async def test_the_first_error_is_raised_and_ends_the_other_steps() -> None:
    ended = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise KeyError("first")

    async def waits() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(KeyError, match="first"):
        await together([waits(), fails(), waits()])
    assert ended == [True, True]
