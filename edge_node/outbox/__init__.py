"""Outbox: a finished round's signed update goes in; it leaves to central, exactly once in effect, or says why not."""

from edge_node.outbox.store import Outbox, OutboxEntry, OutboxState
from edge_node.outbox.uploader import Uploader

__all__ = ["Outbox", "OutboxEntry", "OutboxState", "Uploader"]
