"""Outbox: a signed update enters; it reaches central, in effect once, or says why not."""

from edge_node.outbox.store import Outbox, OutboxEntry, OutboxState
from edge_node.outbox.uploader import Uploader

__all__ = ["Outbox", "OutboxEntry", "OutboxState", "Uploader"]
