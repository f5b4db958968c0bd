"""Releases: candidates enter; signed, immutable releases and the channels that name them leave."""

from central.releases.registry import Registry

__all__ = ["Registry"]
