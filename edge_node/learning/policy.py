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
    same_start: bool
    """The node's last round started from the active release too; the next one would supersede its update."""


@dataclass(frozen=True)
class Decision:
    start: bool
    warm: bool
    """A round is near: load the training libraries now, in the background."""


def decide(settings: LearningSettings, signals: Signals) -> Decision:
    """A second round from one start needs a failure of its own, even where `min_new_failures` is 0: it learns nothing
    else that the first did not."""
    needed = max(settings.min_new_failures, 1) if signals.same_start else settings.min_new_failures
    return Decision(
        start=signals.examples >= settings.min_examples and signals.new_failures >= needed,
        warm=2 * signals.examples >= settings.min_examples,
    )
