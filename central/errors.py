"""Errors of central.

CentralError
+-- SettingsError (ValueError)            exit 2: the environment variables are not usable
+-- CentralUnreachable (ConnectionError)  exit 4: an operator's command got no answer from central
+-- StorageError (OSError)                exit 5: data directory, journal or blobs are not usable
|   +-- StorageFull                       the same: its disk, or its share of the disk, is full
+-- ListenError (OSError)                 exit 6: a port is taken
+-- Refused (ValueError)                  a caller's request was refused; nothing changed;
                                          has a gRPC status and a reason code
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # central.merging is importable without gRPC
    import grpc


class CentralError(Exception):
    """Every error of ours.

    Its message says what happened, the value seen, what was expected and the next step.
    """

    exit_code = 1


class SettingsError(CentralError, ValueError):
    """The environment variables are not usable."""

    exit_code = 2


class CentralUnreachable(CentralError, ConnectionError):
    """A command of the operator got no answer from central."""

    exit_code = 4


class StorageError(CentralError, OSError):
    """The data directory, the journal or the blob store cannot be used."""

    exit_code = 5


class StorageFull(StorageError):
    """There is no room; the same may work later."""


class ListenError(CentralError, OSError):
    """A port is taken, or its address cannot be used."""

    exit_code = 6


REASON_KEY = "lorikeet-reason"
"""Key of the trailing metadata that carries a Reason."""


class Reason(StrEnum):
    """Codes sent beside a refusal. docs/reference/refusals.md is made of these docstrings."""

    BAD_TOKEN = "BAD_TOKEN"
    """The join token is unknown, used up, expired or revoked. Ask central's operator for one."""
    NAME_TAKEN = "NAME_TAKEN"
    """Another node has this name. Set another EDGE_NODE_NAME."""
    KEY_TAKEN = "KEY_TAKEN"
    """This key is enrolled under another name. Set the name back, or make a new key."""
    UNKNOWN_TOKEN = "UNKNOWN_TOKEN"
    """An operator named a token that does not exist: `central tokens list`."""
    UNKNOWN_NODE = "UNKNOWN_NODE"
    """No node with this id is enrolled here."""
    REVOKED_NODE = "REVOKED_NODE"
    """An operator revoked this node. Only a token that readmits it lets it enrol again."""
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    """The caller's certificate has ended."""
    NOT_OPERATOR = "NOT_OPERATOR"
    """The call is for operators; the caller's certificate is that of a node."""
    BAD_SIGNATURE = "BAD_SIGNATURE"
    """The manifest's signature does not fit the node's key."""
    BAD_MANIFEST = "BAD_MANIFEST"
    """The manifest cannot be read, or names another node than its sender."""
    OTHER_BASE = "OTHER_BASE"
    """The node's base model is not central's. Both need the same files, byte for byte."""
    UNKNOWN_START = "UNKNOWN_START"
    """The update names a start that is no release of its cohort."""
    COHORT_MISMATCH = "COHORT_MISMATCH"
    """The certificate or the token names another cohort than the one the node is enrolled in."""
    UNKNOWN_MODULE = "UNKNOWN_MODULE"
    """The payload has a module that the base does not have."""
    BAD_SHAPE = "BAD_SHAPE"
    """A factor has another shape than the base and the manifest say."""
    RANK_TOO_LARGE = "RANK_TOO_LARGE"
    """The rank is above CENTRAL_LIMITS__MAX_RANK, or above the manifest's."""
    BAD_DTYPE = "BAD_DTYPE"
    """A tensor is not of the encoding that the manifest states."""
    NOT_FINITE = "NOT_FINITE"
    """A tensor holds NaN or infinity."""
    NORM_OUT_OF_BOUNDS = "NORM_OUT_OF_BOUNDS"
    """A module's increment is larger than CENTRAL_LIMITS__MAX_NORM."""
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    """The payload is not the one whose digest the manifest names."""
    TOO_LARGE = "TOO_LARGE"
    """The payload, its header or the manifest is larger than central takes."""
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    """The node has too much on central's disk: CENTRAL_LIMITS__NODE_QUOTA_BYTES."""
    TOO_MANY_STREAMS = "TOO_MANY_STREAMS"
    """The node has too many calls open at once: CENTRAL_LIMITS__NODE_UPLOADS, NODE_WATCHES."""
    SILENT_STREAM = "SILENT_STREAM"
    """Nothing came for CENTRAL_LIMITS__UPLOAD_IDLE_S. The upload can go on from there."""
    TAKEN_OVER = "TAKEN_OVER"
    """A newer call of the same node goes on with this upload."""
    TOO_MANY_UPDATES = "TOO_MANY_UPDATES"
    """The node has sent CENTRAL_LIMITS__NODE_UPDATES_PER_HOUR updates in the last hour."""
    MALFORMED_PAYLOAD = "MALFORMED_PAYLOAD"
    """The payload is no LoRA file of ours: damaged, padded, or in another format."""
    UNKNOWN_SECTION = "UNKNOWN_SECTION"
    """The update has a section; this central reads none."""
    FORGOTTEN = "FORGOTTEN"
    """An operator ordered these bytes to be forgotten. They are not taken again."""
    WRONG_OFFSET = "WRONG_OFFSET"
    """Central has another number of bytes than the caller thinks. Ask where to go on."""
    UNKNOWN_COHORT = "UNKNOWN_COHORT"
    """There is no cohort of this name."""
    UNKNOWN_RELEASE = "UNKNOWN_RELEASE"
    """There is no release of this name in the caller's cohort."""
    UNKNOWN_OFFER = "UNKNOWN_OFFER"
    """The evaluation was not asked of this node."""
    NOT_ACCEPTED = "NOT_ACCEPTED"
    """The release is not accepted, or it was withdrawn or collected."""
    BAD_ARGUMENT = "BAD_ARGUMENT"
    """An argument of the call is not possible. The message says what was expected."""
    PAYLOAD_LOST = "PAYLOAD_LOST"
    """A payload that central stored is gone or damaged: `central releases verify`."""
    STORAGE_FAILED = "STORAGE_FAILED"
    """Central cannot use its storage at the moment. Its log says why; try again."""
    STORAGE_FULL = "STORAGE_FULL"
    """Central's disk is full. Try again; `central retention --apply` makes room."""


class Refused(CentralError, ValueError):
    """A caller's request was refused and nothing was changed."""

    def __init__(self, status: grpc.StatusCode, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
