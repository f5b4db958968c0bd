"""Cohorts that exist only as pass rates: what the gate does to candidates whose true effect is known.

In: a gate, numbers of tasks and environments, churn and true changes. Out: rates of rejection, and how far an environment drifts.
A task's outcome flips with probability `churn` each way between reference and candidate; `loss` of the reference's passes are
lost besides. Tasks are drawn anew for every evaluation, so that nothing is learnt by measuring the same release again.
"""

from __future__ import annotations

import numpy as np

from central.evaluation import Gate, Mark, PairedCounts, high_water

RATE = 0.8
"""Pass rate of the reference."""
CHURN = 0.1


def make_gate(alpha: float = 0.05, tolerance_points: float = 5.0) -> Gate:
    return Gate(alpha, tolerance_points, 10.0, {})


def measure(rng: np.random.Generator, name: str, tasks: int, rate: float, loss: float = 0.0) -> PairedCounts:
    """Paired counts of one environment: P(only reference) = churn + loss, P(only candidate) = churn."""
    both, b, c, neither = rng.multinomial(tasks, [rate - CHURN - loss, CHURN + loss, CHURN, 1 - rate - CHURN])
    return PairedCounts(name, False, int(both), int(b), int(c), int(neither))


def make_history(
    rng: np.random.Generator, environments: int, tasks: int, releases: int, alpha: float
) -> dict[str, Mark]:
    """Marks after `releases` accepted releases that changed nothing."""
    gate, verdicts = make_gate(alpha), []
    for version in range(releases):
        counts = [measure(rng, f"e{index}", tasks, RATE) for index in range(environments)]
        verdicts.append((f"r{version + 1}", f"r{version}", gate.decide(counts, {}).environments))
    return high_water(verdicts, alpha)


def rejection_rate(
    gate: Gate, tasks: int, trials: int, *, loss: float = 0.0, environments: int = 30, releases: int = 10, seed: int = 0
) -> float:
    """Share of candidates that are rejected; `loss` is a true fall of the first environment, the others change nothing."""
    rng = np.random.default_rng(seed)
    rejected = 0
    for trial in range(trials):
        if trial % 50 == 0:
            marks = make_history(rng, environments, tasks, releases, gate.alpha)
        counts = [measure(rng, f"e{i}", tasks, RATE, 0.0 if i else loss) for i in range(environments)]
        rejected += not gate.decide(counts, marks).accepted
    return rejected / trials


def drift_points(
    gate: Gate, tasks: int, *, step_points: float, candidates: int = 50, environments: int = 3, seed: int = 0
) -> float:
    """True fall of the first environment after `candidates` in a row, each worse by 0 to 2 * step_points (uniform)."""
    rng = np.random.default_rng(seed)
    rate, verdicts = RATE, []
    for version in range(candidates):
        loss = rng.uniform(0, 2 * step_points / 100)
        counts = [measure(rng, "e0", tasks, rate, loss)]
        counts += [measure(rng, f"e{index}", tasks, RATE) for index in range(1, environments)]
        verdict = gate.decide(counts, high_water(verdicts, gate.alpha))
        if verdict.accepted:
            rate -= loss
            verdicts.append((f"r{version + 1}", f"r{version}", verdict.environments))
    return 100 * (RATE - rate)
