"""When a round starts, and how it learns: a pure function of what the node has seen.

In: settings and counts. Out: a Decision. One round runs at a time, by one method: the first of
CHOICES that is due, the richest signal first. A round needs enough of its signal, and something new
since the last round of its method. An sft round's news must hold failures, unless the node
rehearses: a node that is good at its work does not train on. A grpo round needs an environment with
rollouts and nothing else: a node without any feedback learns too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

from edge_node.errors import EdgeError
from edge_node.settings import LearningSettings

Method = Literal["sft", "dpo", "scored", "kto", "grpo"]
"""The richest signal first."""
RICHEST: tuple[Method, ...] = get_args(Method)


class NothingToLearnFrom(EdgeError, LookupError):
    """No round can start, not even one that an operator asks for."""


@dataclass(frozen=True)
class Signals:
    """What the node has. new_*: after the cursor of the last round of that method."""

    examples: int
    """Stored."""
    new_failures: int
    new_feedback: int
    """Both of the active release."""
    same_start_age_s: float | None
    """Seconds since the last round from the active release started; None without such a round.

    The next round would supersede its update.
    """
    new_corrections: int = 0
    """Of the active release."""
    preferences: int = 0
    new_preferences: int = 0
    groups: int = 0
    """Scored groups of the active release's answers; others are stale."""
    new_groups: int = 0
    liked: int = 0
    disliked: int = 0
    new_dislikes: int = 0
    """Of the active release."""
    rollouts: int = 0
    """Environments whose verifier a grpo round may ask."""
    start_is_explored: bool = False
    """A round from the active release has sent an update, or a grpo round found nothing to gain."""
    was_unrewarded: bool = False
    """The newest round was a grpo round from the active release, and every answer scored zero."""
    sent: Collection[Method] = ()
    """Methods of the rounds from the active release that have sent an update."""


@dataclass(frozen=True)
class Decision:
    start: bool
    warm: bool
    """A round is near: load the training libraries now, in the background."""
    method: Method = "sft"


def decide(settings: LearningSettings, signals: Signals) -> Decision:
    """Whether a round starts now, by which method, and whether one is near."""
    for method, is_due in CHOICES:
        if settings.method in ("auto", method) and is_due(settings, signals):
            return Decision(start=True, warm=True, method=method)
    thumbs = signals.liked + signals.disliked
    stored = max(signals.examples, signals.preferences, signals.groups, thumbs)
    near = settings.method != "grpo" and 2 * stored >= settings.min_examples
    return Decision(start=False, warm=near)


def method_for(
    settings: LearningSettings, asked: Method | None, signals: Signals, misfit: str = ""
) -> Method:
    """How a round learns that an operator asks for, whatever `decide` waits for.

    Args:
        asked: by the operator; None: the richest signal that there is enough of, or any of.
        misfit: why the policy of a grpo round could not be served; empty when it could.

    Raises:
        NothingToLearnFrom: there is nothing of the kind.
    """
    if asked is not None and settings.method not in ("auto", asked):
        raise NothingToLearnFrom(
            f"EDGE_LEARNING__METHOD is {settings.method}, and a round by {asked} was asked for; "
            "expected the same. Ask without --method, or set the variable to auto and restart the "
            "node."
        )
    thumbs = signals.liked + signals.disliked if signals.liked and signals.disliked else 0
    held: dict[Method, int] = {
        "sft": signals.examples,
        "dpo": signals.preferences,
        "scored": signals.groups,
        "kto": thumbs,
        "grpo": 0 if misfit else signals.rollouts,
    }
    allowed = [method for method in RICHEST if settings.method in ("auto", method)]
    needed = dict.fromkeys(RICHEST, settings.min_examples) | {"grpo": 1}
    enough = [method for method in allowed if held[method] >= needed[method]]
    some = [method for method in allowed if held[method]]
    method: Method = (*enough, *some, allowed[0])[0] if asked is None else asked
    if held[method]:
        return method
    lacks: dict[Method, str] = {
        "sft": f"it holds {signals.examples} corrected or verified answers",
        "dpo": f"it holds {signals.preferences} preferences",
        "scored": f"it holds {signals.groups} new scored groups of the active release's answers",
        "kto": f"it holds {signals.liked} liked and {signals.disliked} disliked answers, and needs "
        "both",
        "grpo": misfit or "no environment has rollouts",
    }
    raise NothingToLearnFrom(
        f"This node has nothing to learn from by {method}: {lacks[method]}. Send feedback to POST "
        '/v1/feedback, or set "rollouts": true for an environment in EDGE_ENVIRONMENTS.'
    )


def _is_corrected(settings: LearningSettings, signals: Signals) -> bool:
    return signals.new_corrections > 0 and _sft_is_due(settings, signals)


def _dpo_is_due(settings: LearningSettings, signals: Signals) -> bool:
    enough = signals.preferences >= settings.min_examples
    return enough and _is_new(settings, signals, "dpo", signals.new_preferences)


def _scored_is_due(settings: LearningSettings, signals: Signals) -> bool:
    enough = signals.groups >= settings.min_examples
    return enough and _is_new(settings, signals, "scored", signals.new_groups)


def _kto_is_due(settings: LearningSettings, signals: Signals) -> bool:
    enough = signals.liked + signals.disliked >= settings.min_examples
    both = signals.liked > 0 and signals.disliked > 0
    return enough and both and _is_new(settings, signals, "kto", signals.new_dislikes)


def _is_new(settings: LearningSettings, signals: Signals, method: Method, new: int) -> bool:
    """Whether there is news, and no update that came of a richer signal is superseded."""
    richer = RICHEST[: RICHEST.index(method)]
    return (
        new >= max(1, settings.min_new_failures)
        and not any(sent in richer for sent in signals.sent)
        and _waited(settings, signals)
    )


def _sft_is_due(settings: LearningSettings, signals: Signals) -> bool:
    """A second round from one start needs a failure of its own, even where `min_new_failures` is 0:
    it learns nothing else that the first did not.
    """
    failures = settings.min_new_failures
    if signals.same_start_age_s is not None:
        failures = max(failures, 1)
    return (
        _waited(settings, signals)
        and signals.examples >= settings.min_examples
        and signals.new_feedback >= settings.min_new_feedback
        and signals.new_failures >= failures
    )


def _verified_is_due(settings: LearningSettings, signals: Signals) -> bool:
    """Not where preferences, scored groups or thumbs made an update: it would be superseded."""
    return {"dpo", "scored", "kto"}.isdisjoint(signals.sent) and _sft_is_due(settings, signals)


def _grpo_is_due(settings: LearningSettings, signals: Signals) -> bool:
    """One successful round from a release: the same tasks would teach a second one the same.

    Right after one without any reward the next, which has a warm start, need not wait.
    """
    return (
        signals.rollouts > 0
        and not signals.start_is_explored
        and (signals.was_unrewarded or _waited(settings, signals))
    )


def _waited(settings: LearningSettings, signals: Signals) -> bool:
    """Once the first update of a start is in a merge, a second one is only set aside."""
    age_s = signals.same_start_age_s
    return age_s is None or age_s >= settings.supersede_after_s


CHOICES: tuple[tuple[Method, Callable[[LearningSettings, Signals], bool]], ...] = (
    ("sft", _is_corrected),
    ("dpo", _dpo_is_due),
    ("scored", _scored_is_due),
    ("kto", _kto_is_due),
    ("sft", _verified_is_due),
    ("grpo", _grpo_is_due),
)
"""Corrections, preferences, scored groups, thumbs; then answers that are only known to be right,
and verifiers.
"""
