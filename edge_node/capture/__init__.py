"""Capture: finished answers enter as raw bytes; durable interactions leave. Losses are counted."""

from edge_node.capture.answers import Finished, to_interaction
from edge_node.capture.choosing import is_kept, reason_of, reason_of_episode
from edge_node.capture.patterns import Span
from edge_node.capture.recorder import Recorder, RecorderCounts
from edge_node.capture.redaction import Redaction, Redactor, load_redactor
from edge_node.capture.served import SERVED, Generation, Made, Served
from edge_node.capture.token_texts import Texts, TokenTexts

__all__ = [
    "SERVED",
    "Finished",
    "Generation",
    "Made",
    "Recorder",
    "RecorderCounts",
    "Redaction",
    "Redactor",
    "Served",
    "Span",
    "Texts",
    "TokenTexts",
    "is_kept",
    "load_redactor",
    "reason_of",
    "reason_of_episode",
    "to_interaction",
]
