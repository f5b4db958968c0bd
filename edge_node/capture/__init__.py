"""Capture: finished answers enter as raw bytes; durable interactions leave, and every loss is counted."""

from edge_node.capture.answers import Finished, to_interaction
from edge_node.capture.recorder import Recorder, RecorderCounts

__all__ = ["Finished", "Recorder", "RecorderCounts", "to_interaction"]
