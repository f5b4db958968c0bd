"""Callers that are refused at enrolment wait for the answer, so that nobody guesses tokens.

In: the address of a refused caller. Out: nothing, after a while.

Guarantees: the first few answers to an address come at once. Further ones come one a second per
address and ten a second in all, each at most `LONGEST_S` late. Meanwhile every call of the address
waits at most `ASK_S` before its token is looked at, so hanging up on late answers teaches nothing.
Then a node with the right token is let in, also from the address of somebody who guesses. Memory is
bounded: beyond `ADDRESSES` newcomers share one place. Used on the event loop alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable
from math import inf
from urllib.parse import unquote

FREE = 5
"""Refusals of an address that are answered at once. They come back, one in `PAUSE_S`.

So a mistyped token costs no time.
"""
PAUSE_S = 1.0
RATE, FREE_OF_ALL = 10.0, 50
"""The same for all addresses together: refusals a second, and how many are answered at once."""
LONGEST_S = 12.0
"""An answer is at most this late.

With `ASK_S` this is well below the 20 s that a connection to the enrolment port lives
(central/rpc.py).
"""
ASK_S = 2.0
ADDRESSES = 4096
OTHERS = "others"


class Guesses:
    """One per central."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._due: dict[str, float] = {}
        """When the next answer to an address is due, as if it had used its free ones."""
        self._all_due = -inf

    async def wait_to_ask(self, peer: str) -> None:
        """Wait before the token of `peer` (as gRPC names it) is looked at.

        It waits while its address, or all addresses together, were refused too often.
        """
        if (late_s := self.late_s(peer)) > 0:
            await self._sleep(min(late_s, ASK_S))

    async def wait(self, peer: str) -> None:
        """Wait until the caller `peer` may have its refusal."""
        if (pause_s := self.pause_s(peer)) > 0:
            await self._sleep(pause_s)

    def late_s(self, peer: str) -> float:
        """How late refusals are now, in seconds; counts nothing."""
        return (
            max(self._due.get(address_of(peer), self._due.get(OTHERS, -inf)), self._all_due)
            - self._clock()
        )

    def pause_s(self, peer: str) -> float:
        """Count a refusal; returns how long its answer waits, in seconds."""
        now = self._clock()
        address = self._place(address_of(peer), now)
        due = max(self._due.get(address, -inf), now - FREE * PAUSE_S) + PAUSE_S
        all_due = max(self._all_due, now - FREE_OF_ALL / RATE) + 1 / RATE
        self._due[address], self._all_due = min(due, now + LONGEST_S), min(all_due, now + LONGEST_S)
        return min(max(due, all_due, now) - now, LONGEST_S)

    def _place(self, address: str, now: float) -> str:
        if address in self._due or len(self._due) < ADDRESSES:
            return address
        self._due = {known: due for known, due in self._due.items() if due > now - FREE * PAUSE_S}
        return address if len(self._due) < ADDRESSES else OTHERS


def address_of(peer: str) -> str:
    """The address in `ipv4:127.0.0.1:5000` or `ipv6:%5B::1%5D:5000`.

    Of IPv6 only the first 64 bits, which one site has.
    """
    host = unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False).network_address)
