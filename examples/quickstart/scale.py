"""How large a run of the quickstart is, when it is enough, and the settings that every node and central get.

In: nothing. Out: constants. The settings are ordinary ones (edge_node/settings.py, central/settings.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from examples.quickstart import recipe
from examples.quickstart.environments import Node


@dataclass(frozen=True)
class StopAt:
    """Rates in percent on the newest waves at which a cohort has learnt enough; above the bars, because a wave is a
    sample."""

    mean_a_b: float
    c: float
    d: float

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
    """What is enough once `patience_s` of learning are over: more rounds of a swinging cohort may well be no better."""
    patience_s: float = 0.0

    def is_enough(self, rates: Mapping[str, float], learning_s: float) -> bool:
        """Whether one cohort's newest waves are good enough after `learning_s` seconds."""
        late = self.stop_late_at if learning_s > self.patience_s else None
        return any(stop.holds(rates) for stop in (self.stop_at, late) if stop is not None)


SIZES: Mapping[str, Size] = {
    "full": Size(
        name="full",
        nodes=("A", "B", "C", "D"),
        first_wave=recipe.FIRST_WAVE,
        next_wave=recipe.NEXT_WAVE,
        measured_tasks=100,
        max_releases=7,
        learning_limit_s=360,
        settle_limit_s=60,
        stop_at=StopAt(96, 70, 94),
        stop_late_at=StopAt(94, 66, 92),
        patience_s=150,
    ),
    "small": Size("small", ("A", "B"), 150, 60, 50, 2, 240, 60, None),
}

WAVE_CONCURRENCY = 32
FEEDBACK_SHARE = 0.95
"""Share of a wave whose feedback a round waits for."""
MIN_FAILURES_ALONE = 5
"""Failures of the serving release's own answers that start another round at a node that is alone in its cohort. Nodes
that share a cohort rehearse on every release instead (0): a merge of one node's increment wears the other's away."""

CENTRAL: Mapping[str, str] = {
    # The shared cohort merges when both learning nodes have sent something; a slow one holds nobody up for long.
    "CENTRAL_MERGE__MIN_UPDATES": "2",
    "CENTRAL_MERGE__MAX_AGE_S": "60",
    "CENTRAL_MERGE__COHORTS": json.dumps({"zeta": {"min_updates": 1}}),
    **recipe.MERGE,
    "CENTRAL_GATE__TASKS": "50",
    # One look decides: further ones would cost minutes on two cores.
    "CENTRAL_GATE__MAX_TASKS": "50",
    "CENTRAL_GATE__DEADLINE_S": "60",
    # How far own work and what the base could do may fall below the best release so far before a candidate is rejected. The
    # releases of a cohort that learns still swing in their own work; base skill does not.
    "CENTRAL_GATE__TOLERANCE_POINTS": "20",
    "CENTRAL_GATE__ANCHOR_TOLERANCE_POINTS": "10",
}


def min_failures(cohort: str) -> int:
    """New failures before another round of a node in `cohort`."""
    return 0 if is_shared(cohort) else MIN_FAILURES_ALONE


def is_shared(cohort: str) -> bool:
    """Whether several nodes of the demo learn in this cohort."""
    return cohort == "shared"


def edge_settings(size: Size, cohort: str) -> dict[str, str]:
    """What the nodes of one cohort have in common."""
    return {
        "EDGE_SERVING__DTYPE": "float32",
        "EDGE_SERVING__MAX_MODEL_LEN": "128",
        "EDGE_SERVING__MAX_LORA_RANK": "32",
        **(recipe.LEARNING if is_shared(cohort) else recipe.LEARNING_ALONE),
        "EDGE_LEARNING__MIN_EXAMPLES": str(round(FEEDBACK_SHARE * size.first_wave)),
        "EDGE_LEARNING__MIN_NEW_FEEDBACK": str(round(FEEDBACK_SHARE * size.next_wave)),
        "EDGE_LEARNING__MIN_NEW_FAILURES": str(min_failures(cohort)),
        # After a rejected candidate the next round starts from the same release.
        "EDGE_LEARNING__SUPERSEDE_AFTER_S": "60",
        # Every release stays loaded until the end, when each is asked what the base could do.
        "EDGE_RELEASES__KEEP": "16",
    }


EXAMPLE_PROMPT = "[acme/desk] ticket 7630: move in lyon with normal priority"
