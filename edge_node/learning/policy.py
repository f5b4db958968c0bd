"""When a round starts: a pure function of what the node has seen.

In: settings and counts. Out: a Decision. One round at a time; a round needs enough examples, and failures of the very
release that it starts from, so that a node that is already good at its work does not train on.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_node.settings import LearningSettings


@dataclass(frozen=True)
class Signals:
    """examples: stored ones; new_failures: of answers by the active release, after the last round's cursor."""

    examples: int
    new_failures: int
    same_start_age_s: float | None
    """Seconds since the node's last round started, when that was from the active release too: the next round would
    supersede its update. None when the active release has had no round yet."""


@dataclass(frozen=True)
class Decision:
    start: bool
    warm: bool
    """A round is near: load the training libraries now, in the background."""


def decide(settings: LearningSettings, signals: Signals) -> Decision:
    """A second round from one start needs a failure of its own, even where `min_new_failures` is 0: it learns nothing
    else that the first did not. It also waits: once the first update is in a merge, a second one is only set aside."""
    needed, waited = settings.min_new_failures, True
    if signals.same_start_age_s is not None:
        needed, waited = max(needed, 1), signals.same_start_age_s >= settings.supersede_after_s
    return Decision(
        start=waited and signals.examples >= settings.min_examples and signals.new_failures >= needed,
        warm=2 * signals.examples >= settings.min_examples,
    )
