"""Evaluation: paired counts that nodes measured and earlier marks enter; a verdict with its reasons leaves. No I/O."""

from central.evaluation.counts import PairedCounts, pool
from central.evaluation.gate import Gate, Mark, Verdict, high_water

__all__ = ["Gate", "Mark", "PairedCounts", "Verdict", "high_water", "pool"]
