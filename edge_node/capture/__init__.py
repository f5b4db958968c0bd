"""Capture: finished answers enter as raw bytes; durable interactions leave, and every loss is counted."""

from edge_node.capture.answers import Finished, to_interaction
from edge_node.capture.recorder import Recorder, RecorderCounts
from edge_node.capture.served import SERVED, Generation, Served

__all__ = ["SERVED", "Finished", "Generation", "Recorder", "RecorderCounts", "Served", "to_interaction"]
