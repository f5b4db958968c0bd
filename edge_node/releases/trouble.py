"""What may be said of an error, in the log and to central.

In: an error. Out: words that quote no task, prompt or answer.
"""

from __future__ import annotations

import grpc

from edge_node.errors import EdgeError


def words(error: Exception) -> str:
    """Of an error that is not ours only its kind, as it might quote a task."""
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, EdgeError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return type(error).__name__
