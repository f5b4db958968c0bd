"""Where a round leaves its update."""

from __future__ import annotations

from edge_node.outbox import Outbox
from edge_node.settings import EdgeSettings


def outbox_of(settings: EdgeSettings) -> Outbox:
    return Outbox(settings.data_dir / "outbox", "auto")
