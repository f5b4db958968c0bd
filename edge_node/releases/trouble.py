"""What may be said of an error, in the log and to central; and how soon central is called again.

In: an error. Out: words that quote no task, prompt or answer; and what a person does about it.
"""

from __future__ import annotations

import sqlite3

import grpc

from edge_node.errors import AdapterError, EdgeError, EnvironmentFault, NoLikelihood
from edge_node.problems import SEE_LOG

RETRY_FIRST_S = 0.5
RETRY_LAST_S = 5.0
"""The pause after a failed call to central begins with the first and doubles to the last."""
UNREACHABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
CHECK_CENTRAL = (
    "Check EDGE_CENTRAL__ADDRESS, the network, and that central runs; `edge-node doctor` tries it."
)


def words(error: Exception) -> str:
    """Of an error that is not ours only its kind, as it might quote a task."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, EdgeError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return type(error).__name__


def next_step(error: Exception) -> str:
    """What a person does about `error`, where its words do not say."""
    if isinstance(error, TimeoutError):
        return CHECK_CENTRAL
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return "Ask the operator of central whether this node is revoked (`central nodes`)."
        return CHECK_CENTRAL
    if isinstance(error, EnvironmentFault):
        return (
            f"Run `edge-node environments check {error.environment}`, which shows what it prints. "
            "Correct it or its item of EDGE_ENVIRONMENTS, then start `edge-node serve` again."
        )
    if isinstance(error, AdapterError | NoLikelihood):
        return "Do what it says, or ask the operator of central to roll the release back."
    if isinstance(error, OSError | sqlite3.Error):
        return "Check the disk of EDGE_DATA_DIR: its space and permissions."
    return SEE_LOG
