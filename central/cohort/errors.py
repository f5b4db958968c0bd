"""Errors of federation."""

from __future__ import annotations

from central.errors import CentralError


class FederationError(CentralError, RuntimeError):
    """The loop of a cohort cannot go on; the message says what to change."""


class UnusableUpdate(FederationError):
    """One admitted update cannot be merged. It is set aside, and the others go on."""

    def __init__(self, update_id: str, reason: str) -> None:
        super().__init__(f"Update {update_id[:8]} cannot be merged: {reason}")
        self.update_id = update_id


class LostUpdate(UnusableUpdate):
    """The payload of one update is gone or damaged, while the store has the others.

    The update waits again when its bytes come again.
    """


class StrategyFailed(FederationError):
    """A strategy makes nothing of a plan's updates, and no single one causes it.

    The cohort stands still until its settings change.
    """
