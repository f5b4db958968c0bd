"""How many calls central answered, and how: for its metrics.

In: the end of each call. Out: numbers by method and result. A method is one that a service has, and
a result is `OK`, a Reason or a gRPC status: so there are few of both, whatever callers send.
"""

from __future__ import annotations

from collections import Counter

OK = "OK"


class Calls:
    """One per central. Counted on the event loop; may be read in any thread."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def count(self, method: str, result: str) -> None:
        """`method` as gRPC names it: /lorikeet.updates.v1.UpdateService/Upload."""
        self._counts[method.rpartition(".")[2], result] += 1

    def counts(self) -> dict[tuple[str, str], int]:
        """(`UpdateService/Upload`, result) -> calls since central started."""
        return dict(self._counts)
