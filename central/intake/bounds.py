"""How much of an update's own words central takes, in proportion to the base model: pure.

In: the base's linear modules, a clock. Out: bounds in bytes, and whether a node may send one more update. A manifest stays
in the journal and in memory for ever, and a payload's header takes many times its size while it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from math import ceil

import grpc

from central.errors import Reason, Refused

MANIFEST_BYTES = 8 << 10
"""Of a manifest without sections; a round's has 0.9 KiB."""
HEADER_BYTES = 4 << 10
SECTION_BYTES = 16
"""Of one section's name in a manifest, without its module's."""
ENTRY_BYTES = 144
"""Of one tensor in a header, without its module's name: kind, dtype, shape, offsets."""
ENTRIES = 5
"""Per module: A, B and the scale, and room for a section of two tensors."""
HOUR_S = 3600.0


def manifest_bytes(modules: Iterable[str]) -> int:
    """Longest manifest of an update of a base with these linear modules."""
    return MANIFEST_BYTES + sum(SECTION_BYTES + _length(name) for name in modules)


def header_bytes(modules: Iterable[str]) -> int:
    """Longest safetensors header of a payload for a base with these linear modules."""
    return HEADER_BYTES + sum(ENTRIES * (ENTRY_BYTES + _length(name)) for name in modules)


def _length(name: str) -> int:
    return len(name.encode())


class Allowance:
    """How many updates each node may have admitted: `per_hour` at once, then one more every so often.

    Used by many threads; two updates of a node at the same moment may count as one.
    """

    def __init__(self, per_hour: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds and is never set back."""
        self._per_hour = per_hour
        self._every_s = HOUR_S / per_hour
        self._clock = clock
        self._paid_until: dict[str, float] = {}
        """By node: what it was admitted is paid for at this time."""

    def expect_one(self, node_id: str) -> None:
        """Raises Refused when the node has to wait."""
        wait_s = self._owed_s(node_id) + self._every_s - HOUR_S
        if wait_s > 1e-6:
            raise Refused(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                Reason.TOO_MANY_UPDATES,
                f"Node {node_id} had {self._per_hour} updates admitted within the last hour; central admits no more "
                f"(CENTRAL_LIMITS__NODE_UPDATES_PER_HOUR). Try again in {ceil(wait_s)} s.",
            )

    def take_one(self, node_id: str) -> None:
        """The node has one more update admitted."""
        self._paid_until[node_id] = self._clock() + self._owed_s(node_id) + self._every_s

    def _owed_s(self, node_id: str) -> float:
        return max(0.0, self._paid_until.get(node_id, 0.0) - self._clock())
