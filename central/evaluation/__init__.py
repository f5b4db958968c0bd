"""Evaluation: paired counts that nodes measured and earlier verdicts enter; a verdict with its reasons leaves. No I/O."""

from central.evaluation.counts import Outcomes, PairedCounts, pool
from central.evaluation.gate import Evidence, Figures, Gate, Standing, Verdict, open_environments
from central.evaluation.high_water import high_water

__all__ = [
    "Evidence",
    "Figures",
    "Gate",
    "Outcomes",
    "PairedCounts",
    "Standing",
    "Verdict",
    "high_water",
    "open_environments",
    "pool",
]
