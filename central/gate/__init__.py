"""The gate: paired outcomes and earlier verdicts enter; a verdict with its reasons leaves."""

from central.gate.counts import Outcomes, PairedCounts
from central.gate.high_water import high_water
from central.gate.likelihood import Differences, PairedLikelihood
from central.gate.pooling import Paired, pool
from central.gate.verdict import Evidence, Figures, Gate, Standing, Verdict, open_environments

__all__ = [
    "Differences",
    "Evidence",
    "Figures",
    "Gate",
    "Outcomes",
    "Paired",
    "PairedCounts",
    "PairedLikelihood",
    "Standing",
    "Verdict",
    "high_water",
    "open_environments",
    "pool",
]
