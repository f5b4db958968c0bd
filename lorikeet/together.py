"""Steps at once, of which the first error ends the others.

In: coroutines. Out: their results, in order. `asyncio.gather` would let the others go on after an
error: their requests use a client that is closed by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


async def together(steps: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Raises the first step's error; the other steps are cancelled, and have ended by then."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(step) for step in steps]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
