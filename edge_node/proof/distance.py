"""Is what vLLM serves the release? Decided by log-probabilities of the same tokens.

In: log-probabilities as PEFT's reference of release and base has them, and as vLLM serves them.
Out: how far they are apart, and what is wrong. All are means over all tokens, because single tokens
say little: bfloat16 against float32 differed by 0.07 nats in the mean and by 2.7 at most, of a tiny
random model on 3,432 random tokens.

- A distance is the mean absolute difference, in nats.
- A share says how much of the way from the base to the release vLLM goes: the least-squares slope
  of what is served, minus the base, on what the reference says. Rounding cancels in it, so it tells
  releases that distances cannot. Of that model, with a release 0.14 nats from its base, it was 1.01
  for the release, 0.52 at half its scale, 0.04 for the base and 0.05 for another release.

What vLLM serves as the base, against the base's reference, measures the rounding of this node: its
type, its kernels, a quantised base. Everything else is judged by that.
"""

from __future__ import annotations

import math
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
PART = 0.1
"""Of the way from the release to the base, or to the version before, that counts as rounding."""
MOST_ROUNDING, MOST_QUANTISED = 0.25, 1.0
"""A base that is served further than this from its reference is another base. The second is for one
that vLLM quantises, and was not measured."""
MISSED = 0.2
"""Of a share that may be missing, or too much."""
ERRORS = 4.0
"""Standard errors of a share that must fit into MISSED, or it tells nothing."""
ALIKE = 4.0
"""Neighbouring tokens are not independent: so many count as one."""


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
class Share:
    """Of the way from `what` to the release. error: its standard error. apart: of the two."""

    what: str
    value: float
    error: float
    apart: float

    @property
    def tells(self) -> bool:
        return ERRORS * self.error <= MISSED


@dataclass(frozen=True)
class Distances:
    """shares: from the base, and from the version before where there is one."""

    rounding: float
    to_release: float
    shares: tuple[Share, ...]
    cold_to_cached: float
    """Of the canary whose two answers differ most."""

    @property
    def allowed(self) -> float:
        return max(LEAST, ROUNDING * self.rounding, PART * min(one.apart for one in self.shares))

    @property
    def tells(self) -> bool:
        """Are the answers of release and base, and of the version before, far enough apart?"""
        return all(share.tells for share in self.shares)


def measure(reference: Reference, served: Served) -> Distances:
    noise = math.sqrt(2 * float(np.mean(np.square(served.base - reference.base))))
    shares = [
        _share("the base", reference.release - reference.base, served.release - served.base, noise)
    ]
    if served.before is not None:
        expected = reference.release - served.before
        found = served.release - served.before
        shares.append(_share("the version before it", expected, found, noise))
    return Distances(
        rounding=_distance(served.base, reference.base),
        to_release=_distance(served.release, reference.release),
        shares=tuple(shares),
        cold_to_cached=max(map(_of_following, served.anew, served.cached)),
    )


def wrong(distances: Distances, most_rounding: float = MOST_ROUNDING) -> str | None:
    """What vLLM serves instead of the release; None when it serves the release."""
    d = distances
    if not d.rounding <= most_rounding:  # also when it is not a number
        return (
            f"the base that vLLM serves is not the base of EDGE_BASE__PATH: they are "
            f"{d.rounding:.3g} nats a token apart, and rounding makes at most {most_rounding}"
        )
    if missed := [one for one in d.shares if one.tells and not abs(one.value - 1) <= MISSED]:
        # What is served instead of the release lies on some of the way from the other one as well.
        share = min(missed, key=lambda one: abs(one.value))
        if abs(share.value) <= MISSED:
            return f"it answers as {share.what} does"
        return (
            f"it goes {share.value:.2f} of the way from {share.what} to the release; "
            f"expected 1, within {MISSED}"
        )
    if not d.to_release <= d.allowed:
        return (
            f"its answers are {d.to_release:.3g} nats a token from the release's, and at most "
            f"{d.allowed:.3g} are rounding"
        )
    if not d.cold_to_cached <= d.allowed:
        return (
            "an answer from the prefix cache is not the one that is computed anew: they are "
            f"{d.cold_to_cached:.3g} nats a token apart, allowed {d.allowed:.3g}"
        )
    return None


def _share(what: str, expected: Values, found: Values, noise: float) -> Share:
    squares = float(np.sum(np.square(expected, dtype=np.float64)))
    if squares == 0:
        return Share(what, 1.0, math.inf, 0.0)
    return Share(
        what,
        value=float(np.sum(np.multiply(expected, found, dtype=np.float64))) / squares,
        error=noise * math.sqrt(ALIKE / squares),
        apart=float(np.abs(expected).mean()),
    )


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
