"""High-water releases: for each environment the release that a candidate is compared with.

In: the verdicts of the cohort's accepted releases, oldest first. Out: environment -> release id.
Guarantee: losses do not add up. Losses within the tolerance of each parent would. Losses against
one fixed release cannot.

An accepted release becomes an environment's high-water release when both hold:
- It was compared with the high-water release before it, paired and in one run.
- It was significantly better. A release that only looked better would hide a loss, so the level
  (`BETTER_ALPHA`) is small. It is spent over the looks as alpha is.

An operator may accept a release although an environment fell, in a removal that costs skill. That
release is then the new mark. The first verdict on an environment makes its reference the high-water
release, or the candidate if that was better.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from central.gate.pooling import Paired

BETTER_ALPHA = 0.001
"""Chance, over all looks of an evaluation, that a release which is no better counts as better."""


def is_better(found: Paired, share: float = 1.0) -> bool:
    """Whether the candidate is better than the reference.

    It must be significantly better on the first answers. Where every attempt must pass, it must be
    no worse. `share` is the part of BETTER_ALPHA that this look spends.
    """
    first, *others = found.measures
    return all(other.fall <= 0 for other in others) and first.p_gain() <= BETTER_ALPHA * share


def high_water(
    verdicts: Iterable[tuple[str, Mapping[str, Mapping[str, Any]]]], accepted: Collection[str]
) -> dict[str, str]:
    """Environment -> high-water release.

    Args:
        verdicts: (release id, Verdict.environments) of accepted releases, in the order of their
            verdicts.
        accepted: ids of the releases that may be a high-water release. Abandoned ones may not.
    """
    best: dict[str, str] = {}
    for candidate, environments in verdicts:
        for name, figures in environments.items():
            reference = str(figures["reference"])
            if reference not in accepted:
                reference = candidate
            # A comparison with another release says nothing about the high-water release.
            compared = best.setdefault(name, reference) == reference
            if figures["standing"] == "fell" or (compared and figures["better"]):
                best[name] = candidate
    return best
