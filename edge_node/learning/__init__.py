"""Learning: examples and the served release enter; a trained increment goes to the outbox."""

from edge_node.learning.process import LearnerProcess
from edge_node.learning.records import open_starts

__all__ = ["LearnerProcess", "open_starts"]
