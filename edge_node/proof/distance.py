"""Is what vLLM serves the release? Decided by distances of log-probabilities.

In: log-probabilities of the same tokens, as PEFT's reference of release and base has them and as
vLLM serves them. Out: the distances, and what is wrong. A distance is the mean absolute difference
over all tokens, in nats. Single tokens say little: bfloat16 against float32 differed by 0.001-0.005
in the mean and by 0.17 at most over 200 tokens.

What vLLM serves as the base, against the base's reference, measures the rounding of this node: its
type, its kernels, a quantised base. Everything else is judged by that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float32]
Following = dict[int, float]
"""Token -> log-probability in nats."""

LEAST = 0.01
"""Distances below this are never a difference."""
ROUNDING = 3.0
"""Times the base's own rounding that the release's may be: its adapter is rounded as well."""
SHARE = 0.1
"""Of the way from the release to the base, or to the version before, that counts as rounding."""
MOST_ROUNDING = 0.25
"""A base that is served further than this from its reference is another base."""


@dataclass(frozen=True)
class Reference:
    """What PEFT says of the canaries' tokens after the first.

    prompts: int [canaries, tokens]. release, base: float32 [canaries, tokens - 1], in nats.
    """

    prompts: list[list[int]]
    release: Values
    base: Values


@dataclass(frozen=True)
class Served:
    """What vLLM answers: rows as in Reference.

    before: of the version that the alias points at now; None where it points at none, or at this.
    anew, cached: the likeliest tokens that follow each canary, with their log-probabilities: as the
    release computes them from its first token on, and with the prefix cache.
    """

    release: Values
    base: Values
    before: Values | None
    anew: list[Following]
    cached: list[Following]


@dataclass(frozen=True)
class Distances:
    """apart: of release and base. apart_before: of release and what is served now, or None."""

    rounding: float
    to_release: float
    to_base: float
    apart: float
    to_before: float | None
    apart_before: float | None
    cold_to_cached: float
    """Of the canary whose two answers differ most."""

    @property
    def allowed(self) -> float:
        apart = min(self.apart, self.apart if self.apart_before is None else self.apart_before)
        return max(LEAST, ROUNDING * self.rounding, SHARE * apart)

    @property
    def tells(self) -> bool:
        """Are release and base, and release and the version before, far enough apart to tell?"""
        floor = 2 * max(LEAST, ROUNDING * self.rounding)
        return self.apart > floor and (self.apart_before is None or self.apart_before > floor)


def measure(reference: Reference, served: Served) -> Distances:
    before = served.before
    return Distances(
        rounding=_distance(served.base, reference.base),
        to_release=_distance(served.release, reference.release),
        to_base=_distance(served.release, reference.base),
        apart=_distance(reference.release, reference.base),
        to_before=None if before is None else _distance(served.release, before),
        apart_before=None if before is None else _distance(reference.release, before),
        cold_to_cached=max(map(_of_following, served.anew, served.cached)),
    )


def wrong(distances: Distances) -> str | None:
    """What vLLM serves instead of the release; None when it serves the release."""
    d = distances
    if not d.rounding <= MOST_ROUNDING:  # also when it is not a number
        return (
            f"the base that vLLM serves is not the base of EDGE_BASE__PATH: they are "
            f"{d.rounding:.3g} nats a token apart, and rounding makes at most {MOST_ROUNDING}"
        )
    if not d.to_release <= d.allowed:
        return f"{_nearest(d)}; from the release it is {d.to_release:.3g}, allowed {d.allowed:.3g}"
    if not d.cold_to_cached <= d.allowed:
        return (
            "an answer from the prefix cache is not the one that is computed anew: they are "
            f"{d.cold_to_cached:.3g} nats a token apart, allowed {d.allowed:.3g}"
        )
    return None


def _nearest(d: Distances) -> str:
    if d.to_before is not None and d.to_before <= min(d.to_base, 0.5 * d.to_release):
        return f"it answers as the version before it does, {d.to_before:.3g} nats a token away"
    if d.to_base <= 0.5 * d.to_release:
        return f"it answers as the base does, {d.to_base:.3g} nats a token away"
    return "it answers neither as the release nor as the base does"


def _of_following(one: Following, other: Following) -> float:
    """Mean over the tokens of either; one that a list lacks is at most its least likely."""
    lowest, lowest_other = min(one.values()), min(other.values())
    differences = [
        abs(one.get(token, lowest) - other.get(token, lowest_other))
        for token in one.keys() | other.keys()
    ]
    return sum(differences) / len(differences)


def _distance(one: Values, other: Values) -> float:
    return float(np.abs(one - other).mean())
