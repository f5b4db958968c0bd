"""High-water releases: for every environment the release that a candidate is compared with.

In: the verdicts of the cohort's accepted releases, oldest first. Out: environment -> release id. Losses that stay within the
tolerance of each parent would add up; losses against one release that stays the same cannot.

A release becomes an environment's high-water release when it was accepted after it had been compared, paired and in one run,
with the one before, and was significantly better (`BETTER_ALPHA`, small, and spent over the looks as alpha is: a release that only
looked better would hide a loss).
Where an operator accepted a release although an environment fell (a removal that costs skill), that loss is the new mark.
An environment's first verdict makes the reference of that verdict the high-water release, or the candidate if it was better.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from central.evaluation.counts import Outcomes
from central.evaluation.paired_tests import mcnemar

BETTER_ALPHA = 0.001
"""Chance, over all looks of an evaluation, that a release which is no better is said to be."""


def is_better(first: Outcomes, every_attempt: Outcomes | None = None, share: float = 1.0) -> bool:
    """Significantly better than the reference on the first answers, and no worse where every attempt must pass.

    share: the part of BETTER_ALPHA that this look spends.
    """
    no_worse = every_attempt is None or every_attempt.fall <= 0
    return no_worse and mcnemar(first.only_candidate, first.only_reference) <= BETTER_ALPHA * share


def high_water(
    verdicts: Iterable[tuple[str, str, Mapping[str, Mapping[str, Any]]]], accepted: Collection[str]
) -> dict[str, str]:
    """Environment -> high-water release.

    Args:
        verdicts: (release id, its parent, Verdict.environments) of accepted releases in the order of their verdicts. In old
            verdicts an environment has no `reference`: it was compared with the parent.
        accepted: releases that may be one; those that were abandoned may not.
    """
    best: dict[str, str] = {}
    for candidate, parent, environments in verdicts:
        for name, figures in environments.items():
            reference = str(figures.get("reference", parent))
            if reference not in accepted:
                reference = candidate
            # Better than another release than the high-water one says nothing of that one.
            compared = best.setdefault(name, reference) == reference
            if figures.get("standing") == "fell" or (compared and _was_better(figures)):
                best[name] = candidate
    return best


def _was_better(figures: Mapping[str, Any]) -> bool:
    fields = ("both", "only_reference", "only_candidate", "neither")
    return bool(figures.get("better", is_better(Outcomes(*(int(figures[field]) for field in fields)))))
