"""Environments of texts that exist only as differences of documents, before the gate.

In: true means and spreads, documents per environment. Out: how often the gate rejects or accepts.
Every look asks as many further documents as there were, until there are none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from central.gate import Differences, Evidence, PairedLikelihood, Verdict, open_environments
from central.settings import GateSettings
from tests.unit.central.gate.simulation import DEFAULTS, make_gate


def evaluate(
    rng: np.random.Generator,
    means: Sequence[float],
    spread: float,
    documents: int,
    *,
    skewed: bool = False,
    settings: GateSettings = DEFAULTS,
) -> Verdict:
    """The verdict on a candidate whose environments truly changed by `means`, in nats a token.

    spread: standard deviation of a document's difference. documents: of each environment, all told.
    skewed: few documents gain much (an exponential distribution), instead of a normal one.
    """
    gate = make_gate(settings)
    size = (len(means), documents)
    noise = rng.exponential(size=size) - 1 if skewed else rng.normal(size=size)
    values = np.asarray(means)[:, None] + spread * noise
    seen = dict.fromkeys(range(len(means)), settings.tasks)
    found: dict = {}
    while True:
        evidence = [
            Evidence(
                _paired(index, values[index, :count]),
                "r0",
                spent=found.get(_name(index), {}).get("spent", 0.0),
                last=count >= documents,
            )
            for index, count in seen.items()
        ]
        asked = {_name(index) for index in seen}
        settled = {name: figures for name, figures in found.items() if name not in asked}
        found = gate.look(evidence, settled)
        verdict = gate.verdict(found)
        if verdict is not None:
            return verdict
        still = open_environments(found)
        seen = {index: 2 * count for index, count in seen.items() if _name(index) in still}


def rejected(
    trials: int, means: Sequence[float], spread: float, documents: int, *, skewed: bool = False
) -> float:
    """The part of candidates that is rejected."""
    rng = np.random.default_rng(7)
    verdicts = [evaluate(rng, means, spread, documents, skewed=skewed) for _ in range(trials)]
    return sum(not verdict.accepted for verdict in verdicts) / trials


def _name(index: int) -> str:
    return f"text{index:02}"


def _paired(index: int, values: np.ndarray) -> PairedLikelihood:
    total, squares, count = float(values.sum()), float((values**2).sum()), len(values)
    found = Differences(count, 100 * count, -3.0, -3.0 + total / count, total, squares)
    return PairedLikelihood(_name(index), True, found)
