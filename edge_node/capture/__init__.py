"""Capture: finished answers enter as raw bytes; durable interactions leave. Losses are counted."""

from edge_node.capture.answers import Finished, to_interaction
from edge_node.capture.recorder import Recorder, RecorderCounts
from edge_node.capture.served import SERVED, Generation, Made, Served

__all__ = [
    "SERVED",
    "Finished",
    "Generation",
    "Made",
    "Recorder",
    "RecorderCounts",
    "Served",
    "to_interaction",
]
