"""Serving: requests and loaded releases enter; answers that name their exact version leave. Importing it loads no vLLM."""

from edge_node.serving.client import ControlClient, ControlState, socket_problem
from edge_node.serving.endpoint import is_listening, port_problem, start_problem
from edge_node.serving.process import VllmProcess

__all__ = [
    "ControlClient",
    "ControlState",
    "VllmProcess",
    "is_listening",
    "port_problem",
    "socket_problem",
    "start_problem",
]
