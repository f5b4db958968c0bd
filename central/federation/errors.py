"""Errors of federation."""

from __future__ import annotations

from central.errors import CentralError


class FederationError(CentralError, RuntimeError):
    """The loop of a cohort cannot go on; the message says what to change."""


class UnusableUpdate(FederationError):
    """One update cannot be merged although intake admitted it; it is set aside and the others go on."""

    def __init__(self, update_id: str, reason: str) -> None:
        super().__init__(f"Update {update_id[:8]} cannot be merged: {reason}")
        self.update_id = update_id


class StrategyFailed(FederationError):
    """A stock strategy makes nothing of a plan's updates; they are set aside together and the loop goes on."""
