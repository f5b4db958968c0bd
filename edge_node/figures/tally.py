"""What the supervisor counts because no store does, since its start.

In: switches, proofs, news of central. Out: numbers for gather.py, and a file whose time of change
says when central was heard last. Imports nothing heavy; nothing raises.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

HEARD = "central.heard"
"""Its time of change is when this node last heard of central."""


class Tally:
    """One per supervisor, on its event loop."""

    def __init__(self) -> None:
        self.switches = 0
        self.switch_s = 0.0
        """Time that all switches took: download, load, proof and re-pointing."""
        self.last_switch_s: float | None = None
        self.proofs: Counter[str] = Counter()
        """Proofs of serving by result."""

    def switched(self, seconds: float) -> None:
        """The alias points at another release, so long after the node began to fetch it."""
        self.switches += 1
        self.switch_s += seconds
        self.last_switch_s = seconds

    def proved(self, result: str) -> None:
        """A release was compared with its reference; `result` is one of a few words."""
        self.proofs[result] += 1


TALLY = Tally()
"""Of this process."""


def note_heard(data_dir: Path) -> None:
    """Central was heard now."""
    try:
        (data_dir / HEARD).touch()
    except OSError:  # a full disk, which is told elsewhere
        pass


def last_heard(data_dir: Path) -> float | None:
    """When central was heard last, in seconds since 1970; None: never, or nobody knows."""
    try:
        return min((data_dir / HEARD).stat().st_mtime, time.time())
    except OSError:
        return None
