"""What vLLM's process counts of requests, and what the supervisor told it of the rest.

In: the beginning of every answer; families of figures. Out: numbers for metrics.py. Guarantees: an
answer costs one addition; labels come from short lists, whatever clients send.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from edge_node.figures import Family

OTHER = "other"
"""Every path that is no route of ours."""


class ServingCounts:
    """One per serving process, on its event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """Answers by route and status."""
        self.answers: Counter[str] = Counter()
        """Answers of a model by its exact version."""
        self.told: Sequence[Family] = ()
        self.told_at: float | None = None
        """When the supervisor told its figures last, in seconds since 1970."""

    def answered(self, route: str | None, status: int, version: bytes | None) -> None:
        """An answer begins. route: None for a path that is none of ours. version: the exact model,
        where one answers.
        """
        self.requests[route or OTHER, status] += 1
        if version is not None:
            self.answers[version.decode()] += 1

    def tell(self, families: Sequence[Family]) -> None:
        """The supervisor's figures, all of them."""
        self.told, self.told_at = families, time.time()
