"""Serving: requests enter; answers with their exact version leave. The import loads no vLLM."""

from edge_node.serving.client import (
    ControlClient,
    ControlState,
    SessionAccess,
    Turn,
    control_socket,
    socket_problem,
)
from edge_node.serving.command import kv_cache_bytes
from edge_node.serving.endpoint import is_listening, port_problem, start_problem
from edge_node.serving.process import VllmProcess

__all__ = [
    "ControlClient",
    "ControlState",
    "SessionAccess",
    "Turn",
    "VllmProcess",
    "control_socket",
    "is_listening",
    "kv_cache_bytes",
    "port_problem",
    "socket_problem",
    "start_problem",
]
