"""Settings of what people and machines around the node get from it beside answers.

In: values of settings.py. Out: its groups for logs.
"""

from __future__ import annotations

from edge_node.serving_settings import Group
from lorikeet.logs import LogFormat


class LogSettings(Group):
    format: LogFormat = "text"
    """Form of our log lines: text, or json with an object a line. vLLM's own lines stay text."""
