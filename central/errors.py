"""Errors of central.

CentralError
+-- SettingsError (ValueError)        exit 2: the environment variables are not usable
+-- CentralUnreachable (ConnectionError)  exit 4: a command of the operator got no answer from central
+-- StorageError (OSError)            exit 5: data directory, journal or blob store cannot be used
|   +-- StorageFull                   the same because its disk, or its share of it, is full
+-- ListenError (OSError)             exit 6: a port is taken
+-- Refused (ValueError)              a caller's request was refused; changes nothing; has a gRPC status and a reason code
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # central.merging is importable without gRPC
    import grpc


class CentralError(Exception):
    """Every error of ours; the message says what happened, the value seen, what was expected and the next step."""

    exit_code = 1


class SettingsError(CentralError, ValueError):
    exit_code = 2


class CentralUnreachable(CentralError, ConnectionError):
    exit_code = 4


class StorageError(CentralError, OSError):
    exit_code = 5


class StorageFull(StorageError):
    """There is no room; the same may work later."""


class ListenError(CentralError, OSError):
    exit_code = 6


REASON_KEY = "lorikeet-reason"
"""Key of the trailing metadata that carries a Reason."""


class Reason(StrEnum):
    """Codes sent beside a refusal."""

    BAD_TOKEN = "BAD_TOKEN"
    NAME_TAKEN = "NAME_TAKEN"
    KEY_TAKEN = "KEY_TAKEN"
    UNKNOWN_TOKEN = "UNKNOWN_TOKEN"
    UNKNOWN_NODE = "UNKNOWN_NODE"
    REVOKED_NODE = "REVOKED_NODE"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    NOT_OPERATOR = "NOT_OPERATOR"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    BAD_MANIFEST = "BAD_MANIFEST"
    OTHER_BASE = "OTHER_BASE"
    UNKNOWN_START = "UNKNOWN_START"
    COHORT_MISMATCH = "COHORT_MISMATCH"
    UNKNOWN_MODULE = "UNKNOWN_MODULE"
    BAD_SHAPE = "BAD_SHAPE"
    RANK_TOO_LARGE = "RANK_TOO_LARGE"
    BAD_DTYPE = "BAD_DTYPE"
    NOT_FINITE = "NOT_FINITE"
    NORM_OUT_OF_BOUNDS = "NORM_OUT_OF_BOUNDS"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    TOO_LARGE = "TOO_LARGE"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    SILENT_STREAM = "SILENT_STREAM"
    TAKEN_OVER = "TAKEN_OVER"
    TOO_MANY_UPDATES = "TOO_MANY_UPDATES"
    MALFORMED_PAYLOAD = "MALFORMED_PAYLOAD"
    UNKNOWN_SECTION = "UNKNOWN_SECTION"
    FORGOTTEN = "FORGOTTEN"
    WRONG_OFFSET = "WRONG_OFFSET"
    UNKNOWN_COHORT = "UNKNOWN_COHORT"
    UNKNOWN_RELEASE = "UNKNOWN_RELEASE"
    UNKNOWN_OFFER = "UNKNOWN_OFFER"
    NOT_ACCEPTED = "NOT_ACCEPTED"
    BAD_ARGUMENT = "BAD_ARGUMENT"
    PAYLOAD_LOST = "PAYLOAD_LOST"
    STORAGE_FAILED = "STORAGE_FAILED"
    STORAGE_FULL = "STORAGE_FULL"


class Refused(CentralError, ValueError):
    """A caller's request was refused and nothing was changed."""

    def __init__(self, status: grpc.StatusCode, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
