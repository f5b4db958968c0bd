"""Environments: settings name a plug-in; out come tasks with verdicts, episodes or runs, or texts.

A plug-in runs in a process of its own.
"""

from edge_node.environments.contract import (
    AgentRun,
    Agents,
    AnyEnvironment,
    Document,
    Environment,
    Episode,
    Episodes,
    Outcome,
    Split,
    Task,
    TextEnvironment,
    ToolEnvironment,
)
from edge_node.environments.drawing import by_weight
from edge_node.environments.process import EnvironmentProcess, in_own_thread, verify_all

__all__ = [
    "AgentRun",
    "Agents",
    "AnyEnvironment",
    "Document",
    "Environment",
    "EnvironmentProcess",
    "Episode",
    "Episodes",
    "Outcome",
    "Split",
    "Task",
    "TextEnvironment",
    "ToolEnvironment",
    "by_weight",
    "in_own_thread",
    "verify_all",
]
