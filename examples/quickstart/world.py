"""What one demo is about: a base model, nodes, their work, how they learn, and what must come out.

In: nothing. Out: the types that `tiny.py` (the quickstart) and `examples/smollm2/world.py` fill in.
Everything else of the demo (processes, story, report, picture) is the same for every world.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_node.settings import EnvironmentSpec
from examples.quickstart.environments import Node

Report = dict[str, Any]


@dataclass(frozen=True)
class NodePlan:
    """One node of the story."""

    key: Node
    """A, B, C or D: its letter in the story and in reports."""
    cohort: str
    environment: str
    """Name of its own environment."""
    learns: bool = True

    @property
    def name(self) -> str:
        return self.key.lower()


@dataclass(frozen=True)
class StopAt:
    """Rates in percent on the newest waves at which a cohort has learnt enough.

    They lie above the bars, because a wave is a sample.
    """

    mean_a_b: float
    c: float
    d: float = 0.0

    def holds(self, rates: Mapping[str, float]) -> bool:
        """`rates`: those of one cohort's nodes."""
        if "A" in rates and (rates["A"] + rates["B"]) / 2 < self.mean_a_b:
            return False
        return rates.get("C", 100.0) >= self.c and rates.get("D", 100.0) >= self.d


@dataclass(frozen=True)
class Size:
    name: str
    nodes: tuple[Node, ...]
    first_wave: int
    """Tasks with feedback before the first round; a round waits for this many examples."""
    next_wave: int
    """Tasks with feedback on each further release."""
    measured_tasks: int
    """Held-out tasks for each figure of the report."""
    max_releases: int
    """Releases of the shared cohort after which the driver stops anyway."""
    learning_limit_s: float
    settle_limit_s: float
    stop_at: StopAt | None
    """None: always go on to max_releases, and check no bars."""
    stop_late_at: StopAt | None = None
    """What is enough once `patience_s` of learning are over.

    More rounds of a swinging cohort may well be no better.
    """
    patience_s: float = 0.0

    def is_enough(self, rates: Mapping[str, float], learning_s: float) -> bool:
        """Whether one cohort's newest waves are good enough after `learning_s` seconds."""
        late = self.stop_late_at if learning_s > self.patience_s else None
        return any(stop.holds(rates) for stop in (self.stop_at, late) if stop is not None)


@dataclass(frozen=True)
class Asking:
    """How the driver asks a node."""

    max_answer_tokens: int = 64
    timeout_s: float = 60.0
    at_once: int = 32
    """Requests in flight at a node."""


@dataclass(frozen=True)
class Bar:
    """One thing that a full run must show."""

    text: str
    seen: str
    holds: bool


@dataclass(frozen=True)
class World:
    """One demo."""

    name: str
    title: str
    seed_chooses: str
    """What another seed changes, for the report."""
    model: str
    """`python -m MODEL --cache DIR` prints the directory of the base, which it makes once."""
    sizes: Mapping[str, Size]
    nodes: Mapping[Node, NodePlan]
    own: Callable[[NodePlan, int], EnvironmentSpec]
    """A node's own work, for a seed."""
    anchor: Callable[[int], EnvironmentSpec]
    """What the base could do, for a seed."""
    asking: Asking
    central: Mapping[str, str]
    """CENTRAL_* settings."""
    edge: Callable[[Size, str], dict[str, str]]
    """EDGE_* settings (and other variables) of the nodes of one cohort."""
    min_failures: Callable[[str], int]
    """New failures before another round of a node in a cohort."""
    bars: Callable[[Report], list[Bar]]
    """What this world must show; what every run must show is in report.py."""
    lowest_anchor: Callable[[Report], float]
    """The bar of the base's skill in percent, for the picture."""
    example_prompt: str
    beside_base: Callable[[Path], Mapping[str, str]] = lambda base: {}
    """Makes once what a node needs beside the base; the settings that say so to every node."""
    peers_limit_s: float = 30.0
    """A node's wave waits this long for its cohort's waves on the same release, then gives
    feedback."""
    texts: EnvironmentSpec | None = None
    """English that a release must not find less likely."""


def in_words(values: Mapping[str, float]) -> str:
    """Rates by node for people, e.g. `A 95, B 99`."""
    return ", ".join(f"{key} {value:.0f}" for key, value in values.items())
