"""Environments: settings name a plug-in; out come tasks, and a verdict on every answer to them."""

from edge_node.environments.contract import Environment, Outcome, Split, Task
from edge_node.environments.loader import GROUP, load_environment

__all__ = ["GROUP", "Environment", "Outcome", "Split", "Task", "load_environment"]
