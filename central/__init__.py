"""Central: signed updates from nodes go in; gated, signed releases come out."""

__version__ = "0.1.0"
