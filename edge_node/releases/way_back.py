"""Work that nobody waits for any more when its reason is gone.

In: work, and what tells that its reason may have changed. Out: its result, or None. The way back to
a loaded release must not wait for the download of the release that it replaces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def while_it_holds(
    work: Coroutine[Any, Any, T], changed: asyncio.Event, holds: Callable[[], bool]
) -> T | None:
    """The result of `work`, or its error. None when `holds` is false before: then it is cancelled.

    `holds` is asked whenever `changed` is set, which stays set only where it is false.
    """
    working = asyncio.ensure_future(work)
    try:
        while holds():
            changed.clear()
            changing = asyncio.ensure_future(changed.wait())
            await asyncio.wait({working, changing}, return_when=asyncio.FIRST_COMPLETED)
            changing.cancel()
            if working.done():
                return working.result()
        return None
    finally:
        working.cancel()
