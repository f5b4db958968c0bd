"""Cohorts that exist only as pass rates: what the gate does to candidates whose true effect is
known.

In: a gate with its settings, numbers of environments, churn and true losses. Out: rates of
rejection, tasks asked, how far an environment drifts, and the exact chances of single candidates. A
task's outcome flips with probability `CHURN` each way between reference and candidate; `loss` of
the reference's passes are lost besides. Every look asks fresh tasks of the environments that are
still open, as cohort/looks.py does.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from central.gate import (
    Evidence,
    Figures,
    Gate,
    PairedCounts,
    Standing,
    Verdict,
    high_water,
    open_environments,
)
from central.settings import GateSettings

RATE = 0.8
"""Pass rate of the reference."""
CHURN = 0.1
DEFAULTS = GateSettings()


def make_gate(settings: GateSettings = DEFAULTS) -> Gate:
    return Gate(
        settings.alpha,
        settings.tolerance_points,
        settings.anchor_tolerance_points,
        settings.environments,
        settings.margin_points,
        max(settings.tasks, settings.max_tasks),
        settings.likelihood_tolerance_nats,
        settings.likelihood_margin_nats,
    )


@dataclass(frozen=True)
class Evaluated:
    verdict: Verdict
    tasks: tuple[int, ...]
    """Asked of each environment."""


@dataclass(frozen=True)
class Rates:
    rejected: float
    tasks: float
    """Mean per environment and candidate."""
    tasks_of_first: float
    """The same of the first environment alone."""


def evaluate(
    rng: np.random.Generator,
    gate: Gate,
    first_look: int,
    losses: Sequence[float],
    references: Sequence[str] | None = None,
) -> Evaluated:
    """The verdict on a candidate whose true losses against its references are `losses`.

    One loss for each environment.
    """
    names = [f"e{index:02}" for index in range(len(losses))]
    chances = [[RATE - CHURN - loss, CHURN + loss, CHURN, 1 - RATE - CHURN] for loss in losses]
    seen = np.zeros((len(losses), 4), dtype=int)
    asked = dict.fromkeys(names, first_look)
    found: dict = {}
    while True:
        for index, name in enumerate(names):
            if name in asked:
                seen[index] += rng.multinomial(asked[name], chances[index])
        evidence = [
            Evidence(
                PairedCounts(name, False, *map(int, seen[index])),
                references[index] if references else "r0",
                spent=found.get(name, {}).get("spent", 0.0),
                last=False,
            )
            for index, name in enumerate(names)
            if name in asked
        ]
        found = gate.look(
            evidence, {name: figures for name, figures in found.items() if name not in asked}
        )
        verdict = gate.verdict(found)
        if verdict is not None:
            return Evaluated(verdict, tuple(int(row.sum()) for row in seen))
        totals = {name: found[name]["total"] for name in open_environments(found)}
        asked = {name: min(total, gate.max_tasks - total) for name, total in totals.items()}


def rates(
    trials: int,
    *,
    loss: float = 0.0,
    environments: int = 30,
    settings: GateSettings = DEFAULTS,
    seed: int = 0,
) -> Rates:
    """`loss` is a true fall of the first environment; the others change nothing."""
    rng, gate = np.random.default_rng(seed), make_gate(settings)
    losses = [loss] + [0.0] * (environments - 1)
    runs = [evaluate(rng, gate, settings.tasks, losses) for _ in range(trials)]
    return Rates(
        rejected=sum(not run.verdict.accepted for run in runs) / trials,
        tasks=float(np.mean([run.tasks for run in runs])),
        tasks_of_first=float(np.mean([run.tasks[0] for run in runs])),
    )


@dataclass(frozen=True)
class Chances:
    accepted: float
    better: float
    """Accepted, and said to be better than its reference."""


def chances(loss: float, *, environments: int = 3, settings: GateSettings = DEFAULTS) -> Chances:
    """What becomes of a candidate with this true loss in one environment, the others being settled:
    summed over all counts that the gate can see at its looks, and not simulated.
    """
    gate = make_gate(settings)
    others = {
        name: figures
        for index in range(environments - 1)
        for name, figures in gate.look(
            [Evidence(PairedCounts(f"o{index}", False, 1, 0, 0, 0), "r0")]
        ).items()
    }
    undecided, n, spent, accepted, better = np.ones((1, 1)), 0, 0.0, 0.0, 0.0  # chance of [b, c]
    while n < gate.max_tasks:
        more = settings.tasks if n == 0 else min(n, gate.max_tasks - n)
        undecided, n = _convolve(undecided, _outcomes(more, loss)), n + more
        for c in map(int, np.flatnonzero(undecided.sum(axis=0) > 1e-14)):
            first = partial(_first, gate, others, n, c, spent)
            fell = first(lambda found: found["standing"] == Standing.FELL)
            fine = (
                fell
                if n == gate.max_tasks
                else first(lambda found: found["standing"] != Standing.FINE)
            )
            column = undecided[:, c]
            accepted += float(column[:fine].sum())
            better += float(column[: min(fine, first(lambda found: not found["better"]))].sum())
            column[:fine] = column[fell:] = 0.0
        spent = n / gate.max_tasks
    return Chances(accepted, better)


def _first(
    gate: Gate,
    others: dict[str, Figures],
    n: int,
    c: int,
    spent: float,
    said: Callable[[Figures], bool],
) -> int:
    """The smallest number of tasks that only the reference passed of which `said` is true; it stays
    true of larger ones.
    """

    def holds(b: int) -> bool:
        item = Evidence(PairedCounts("e", False, n - c - b, b, c, 0), "r0", spent=spent, last=False)
        return said(gate.look([item], others)["e"])

    return bisect_left(range(n - c + 1), True, key=holds)


def _outcomes(tasks: int, loss: float) -> np.ndarray:
    """Chance of [b, c] in so many tasks, without what is rarer than 1e-18."""
    p, q = CHURN + loss, CHURN
    b, c = np.meshgrid(
        *(np.arange(min(tasks, int(tasks * x + 9 * math.sqrt(tasks * x))) + 1) for x in (p, q)),
        indexing="ij",
    )
    logs = np.array([math.lgamma(k + 1) for k in range(tasks + 1)])
    rest = np.maximum(tasks - b - c, 0)
    logarithm = logs[tasks] - logs[b] - logs[c] - logs[rest] + b * math.log(p) + c * math.log(q)
    return np.where(b + c <= tasks, np.exp(logarithm + rest * math.log(1 - p - q)), 0.0)


def _convolve(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    shape = (x.shape[0] + y.shape[0] - 1, x.shape[1] + y.shape[1] - 1)
    return np.maximum(np.fft.irfft2(np.fft.rfft2(x, shape) * np.fft.rfft2(y, shape), shape), 0.0)


@dataclass(frozen=True)
class Drift:
    points: float
    """Largest true fall of the first environment below where it began."""
    accepted: int
    tasks: float
    """Mean asked of the first environment per candidate."""


def drift(
    *,
    step_points: float,
    candidates: int = 50,
    environments: int = 3,
    settings: GateSettings = DEFAULTS,
    seed: int = 0,
) -> Drift:
    """`candidates` in a row, each worse than the head by 0 to 2 * step_points (uniform) in the
    first environment.

    The head is the last accepted one; the first environment is compared with its high-water
    release, as verdicts leave it.
    """
    rng, gate = np.random.default_rng(seed), make_gate(settings)
    true = {"r0": RATE}
    verdicts: list[tuple[str, dict]] = []
    head, best, asked = "r0", "r0", []
    for number in range(1, candidates + 1):
        candidate = f"r{number}"
        true[candidate] = true[head] - rng.uniform(0, 2 * step_points / 100)
        # A high-water release that is worse than the candidate shows as a gain; churn bounds what
        # the simulation can show of it.
        loss = max(true[best] - true[candidate], -CHURN)
        run = evaluate(
            rng,
            gate,
            settings.tasks,
            [loss] + [0.0] * (environments - 1),
            [best] + ["r0"] * (environments - 1),
        )
        asked.append(run.tasks[0])
        if run.verdict.accepted:
            verdicts.append((candidate, run.verdict.environments))
            head, best = candidate, high_water(verdicts, true.keys())["e00"]
    return Drift(100 * (RATE - true[head]), len(verdicts), float(np.mean(asked)))
