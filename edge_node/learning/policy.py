"""When a round starts: a pure function of what the node has seen.

In: settings and counts. Out: a Decision. One round at a time; a round needs enough examples, and feedback on the very
release that it starts from: failures, unless the node is to rehearse, so that a node that is already good at its work
does not train on.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_node.settings import LearningSettings


@dataclass(frozen=True)
class Signals:
    """examples: stored ones; new_failures, new_feedback: on answers by the active release, after the last round's cursor."""

    examples: int
    new_failures: int
    new_feedback: int
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
    failures, waited = settings.min_new_failures, True
    if signals.same_start_age_s is not None:
        failures, waited = max(failures, 1), signals.same_start_age_s >= settings.supersede_after_s
    enough = signals.examples >= settings.min_examples and signals.new_feedback >= settings.min_new_feedback
    return Decision(
        start=waited and enough and signals.new_failures >= failures,
        warm=2 * signals.examples >= settings.min_examples,
    )
