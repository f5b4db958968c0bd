"""The RPC edge: domain errors become gRPC status, message and reason, once and for every service.

In: whatever a handler raises. Out: `Refused` as its own status with `lorikeet-reason` in the
trailing metadata, other known errors as a fitting status, and anything else as INTERNAL with the
traceback in central's log only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import grpc

from central.blobs.store import BlobLost
from central.calls import OK, Calls
from central.errors import REASON_KEY, CentralError, Reason, Refused, StorageError, StorageFull
from central.journal import JournalConflict
from central.settings import LimitSettings

log = logging.getLogger(__name__)

QUIET_S = 60.0
"""Seconds between two equal lines of the log, at least."""
MAX_TEXT = 2000
"""Longest status message. It may quote a caller, and gRPC drops a call with too large trailers."""
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in the stubs only
    Handler = grpc.RpcMethodHandler
    Interceptor = grpc.aio.ServerInterceptor
Context = grpc.aio.ServicerContext[Any, Any]

Options = tuple[tuple[str, int], ...]
SERVER_OPTIONS: Options = (
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Nodes ping every 20 s, also without a call; without these lines the server would hang up on
    # them.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Pings that come faster than that are a flood: after so many of them the connection is closed.
    ("grpc.http2.max_ping_strikes", 5),
    # What may come before it is asked for. The default grows with the line's speed to megabytes a
    # stream.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 << 10),
)
STREAMS = 64
"""Calls at once on one connection. A node has a watch, and a few uploads, downloads and questions.
"""
IDLE_S = 600
"""A node's connection without any call is closed after so long. A node that serves has a watch."""
ENROLLMENT_STREAMS = 4
ENROLLMENT_MESSAGE_BYTES = 64 << 10
"""A token, a name and a certificate request take 2 KiB."""
ENROLLMENT_AGE_S = 10
ENROLLMENT_GRACE_S = 10
"""A connection to the enrolment port ends after both times; it is meant for one call."""
ENROLLMENT_RECEIVE_BUFFER_BYTES = 32 << 10
"""A small buffer makes gRPC pause, and it reads only what came without a pause."""


def server_options(limits: LimitSettings, connections: int) -> Options:
    """Options of the mutual-TLS port, which takes `connections`."""
    return (
        *SERVER_OPTIONS,
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.max_connection_idle_ms", IDLE_S * 1000),
    )


def enrollment_options(limits: LimitSettings) -> Options:
    """Options of the enrolment port, where anybody may connect."""
    return (
        *SERVER_OPTIONS,
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.max_allowed_incoming_connections", limits.enrollment_connections),
        ("grpc.max_concurrent_streams", ENROLLMENT_STREAMS),
        ("grpc.max_receive_message_length", ENROLLMENT_MESSAGE_BYTES),
        ("grpc.max_connection_idle_ms", int(limits.handshake_s * 1000)),
        ("grpc.max_connection_age_ms", ENROLLMENT_AGE_S * 1000),
        ("grpc.max_connection_age_grace_ms", ENROLLMENT_GRACE_S * 1000),
        ("grpc.tcp_receive_buffer_size", ENROLLMENT_RECEIVE_BUFFER_BYTES),
    )


class ErrorTranslator(Interceptor):
    """Wraps every handler of a server, and counts how its calls end."""

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls or Calls()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: grpc answers by itself
            return cast(Handler, None)
        wrap = _streaming if handler.response_streaming else _single
        asks = "stream" if handler.request_streaming else "unary"
        answers = "stream" if handler.response_streaming else "unary"
        kind = f"{asks}_{answers}"
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped: Handler = make(
            wrap(getattr(handler, kind), handler_call_details.method, self._calls),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return wrapped


def _single(behaviour: Any, method: str, calls: Calls) -> Callable[[Any, Context], Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        try:
            answer = await behaviour(request, context)
        except Exception as error:
            calls.count(method, _result(error))
            await _abort(context, error, method)
        calls.count(method, OK)
        return answer

    return call


def _streaming(
    behaviour: Any, method: str, calls: Calls
) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
        except Exception as error:
            calls.count(method, _result(error))
            await _abort(context, error, method)
        calls.count(method, OK)

    return call


def _result(error: Exception) -> str:
    """Why a call failed, in a word of a short list."""
    if isinstance(error, Refused):
        return error.reason.value
    for kind, word in _RESULTS:
        if isinstance(error, kind):
            return word
    return "INTERNAL"


class Repeats:
    """Which of many equal log lines are written: the first, then one a minute with a count.

    Any caller can fail at will, and must not fill central's disk with lines. The keys are few:
    methods with reasons, and damaged blobs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[tuple[str, ...], tuple[float, int]] = {}

    def count(self, *key: str) -> int:
        """How many lines the one to be written stands for; 0: write none."""
        now = self._clock()
        since, unwritten = self._seen.get(key, (-QUIET_S, 0))
        if now - since < QUIET_S:
            self._seen[key] = (since, unwritten + 1)
            return 0
        self._seen[key] = (now, 0)
        return unwritten + 1


_repeats = Repeats()
_RESULTS: tuple[tuple[type[Exception], str], ...] = (
    (grpc.aio.AbortError, "ABORTED"),
    (JournalConflict, "ABORTED"),
    (BlobLost, Reason.PAYLOAD_LOST.value),
    (StorageFull, Reason.STORAGE_FULL.value),
    (StorageError, Reason.STORAGE_FAILED.value),
    (CentralError, "FAILED_PRECONDITION"),
)
"""As `_abort` answers them; the first that fits."""


def _log(
    level: int,
    text: str,
    method: str,
    reason: str = "",
    exc_info: Exception | None = None,
    **fields: str,
) -> None:
    if count := _repeats.count(text, method, reason):
        known = {"method": method, **({"reason": reason} if reason else {}), **fields}
        log.log(
            level,
            text,
            extra={**known, **({"times": count} if count > 1 else {})},
            exc_info=exc_info,
        )


async def _abort(context: Context, error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    text = str(error)[:MAX_TEXT]
    if isinstance(error, Refused):
        _log(logging.INFO, "call refused", method, error.reason, detail=text)
        await context.abort(error.status, text, ((REASON_KEY, error.reason.value),))
    if isinstance(error, JournalConflict):
        _log(logging.WARNING, "call conflicts with the journal", method, detail=text)
        await context.abort(
            grpc.StatusCode.ABORTED, f"{text} Look at the present state and try again."
        )
    if isinstance(error, BlobLost):
        _log(logging.ERROR, "stored payload lost", method, str(error))  # every damaged one is named
        await context.abort(
            grpc.StatusCode.DATA_LOSS,
            "A payload that central stored is gone or was altered. Its operator must restore it: "
            "central's log names it, `central releases verify` finds every one.",
            ((REASON_KEY, Reason.PAYLOAD_LOST.value),),
        )
    if isinstance(error, StorageFull):
        _log(logging.ERROR, "storage full", method, detail=str(error))
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            "Central's disk is full. Try again later; central's operator has to make room "
            "(`central retention --apply`).",
            ((REASON_KEY, Reason.STORAGE_FULL.value),),
        )
    if isinstance(error, StorageError):
        _log(logging.ERROR, "storage failed", method, detail=str(error))
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            "Central cannot use its storage at the moment; its log says why. Try again later.",
            ((REASON_KEY, Reason.STORAGE_FAILED.value),),
        )
    if isinstance(error, CentralError):
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
    _log(logging.ERROR, "call failed", method, type(error).__name__, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "Central failed at this call; its log says why.")
    raise AssertionError("abort always raises")
