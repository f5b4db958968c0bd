"""The node's figures for Prometheus: what its stores and processes say, gathered by the supervisor.

In: stores, problems, what the supervisor counts. Out: families of numbers, for vLLM's process,
which shows them beside its own.
"""

from edge_node.figures.family import Family
from edge_node.figures.tally import TALLY, Tally

__all__ = ["TALLY", "Family", "Tally"]
