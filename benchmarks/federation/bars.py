"""What a federation must show, beside one learner that has all the data.

In: success[rule][seed][round][environment] in percent, and before[seed][environment]. Out: bars by
name. A gain is what came to the success before the first round. The centralised gain is the best of
its rounds, so a bar does not fall because the centralised learner had a bad round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from benchmarks.federation.chains import SLOW

SHARE = 0.9
"""Of the centralised gain."""
ANCHOR_SHARE = 0.95
"""Of what the base could do before."""
ENCODING_POINTS = 1.0
"""How far bf16 and int8 may be below float32: the mean of A, B and C over rounds and seeds."""
ENCODED = ("default", "int8-both")
"""Chains that are the product mean but for what is rounded."""
ByRound = Mapping[str, Mapping[str, float]]
Successes = Mapping[str, Mapping[str, ByRound]]
"""By rule, seed, round, environment."""

REACHED_AT: Mapping[str, tuple[int, int]] = {
    "default": (3, 5),
    "ranks": (3, 5),
    "slow": (3 * SLOW, 3 * SLOW),
}
"""Rounds at which A and B, and at which C and the base's skill, are looked at. Of the slow node's
chain: after its third round.
"""


def bars(success: Successes, before: ByRound) -> dict[str, bool]:
    """Each bar of every seed; only those whose chains were run far enough."""
    found: dict[str, bool] = {}
    best = success.get("centralised", {})
    for rule, (own, other) in REACHED_AT.items():
        for seed, rounds in success.get(rule, {}).items():
            if seed not in best or not {str(own), str(other)} <= rounds.keys():
                continue
            for what, names, at in (("A and B", "AB", own), ("C", "C", other)):
                most = max(gain(before[seed], figures, names) for figures in best[seed].values())
                reached = gain(before[seed], rounds[str(at)], names)
                text = f"{rule}: {what} at least 90 % of the centralised gain, round {at}"
                found[f"{text}, seed {seed}"] = reached >= SHARE * most
            kept = rounds[str(other)]["base"] >= ANCHOR_SHARE * before[seed]["base"]
            found[f"{rule}: anchor at least 95 % of before, round {other}, seed {seed}"] = kept
    for rule in ENCODED:
        if (points := fall(success, rule)) is not None:
            found[f"{rule}: at most 1 point below float32"] = points <= ENCODING_POINTS
    return found


def gain(before: Mapping[str, float], after: Mapping[str, float], names: Sequence[str]) -> float:
    """Points that came to the mean of these environments."""
    return mean(after[name] - before[name] for name in names)


def fall(success: Successes, rule: str) -> float | None:
    """Points by which the rule is below the product mean in float32; None where one is missing."""
    exact, other = success.get("product-mean", {}), success.get(rule, {})
    points = [
        exact[seed][at][name] - other[seed][at][name]
        for seed in exact.keys() & other.keys()
        for at in exact[seed].keys() & other[seed].keys()
        for name in "ABC"
    ]
    return mean(points) if points else None
