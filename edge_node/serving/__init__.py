"""Serving: requests and loaded releases enter; answers that name their exact version leave. Importing it loads no vLLM."""

from edge_node.serving.client import ControlClient, ControlState
from edge_node.serving.process import VllmProcess

__all__ = ["ControlClient", "ControlState", "VllmProcess"]
