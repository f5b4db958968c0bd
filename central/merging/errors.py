"""Errors of merging."""

from __future__ import annotations

from central.errors import CentralError


class MergeError(CentralError, ValueError):
    """The inputs cannot be combined; `module` names where."""

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module
