"""The operator's side of OperatorService, for the command line on central's own machine.

In: settings, whose data directory holds the operator's key and certificate. Out: answers as
messages, or as plain values for JSON. Errors: CentralUnreachable when nobody answers, CentralError
with central's own words when it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from central.errors import REASON_KEY, CentralError, CentralUnreachable, StorageError
from central.settings import CentralSettings
from lorikeet.clock import wall_time
from protos.operators.v1 import operators_pb2_grpc

T = TypeVar("T")
CALL_TIMEOUT_S = 30.0
WILDCARDS = ("0.0.0.0", "::")


class OperatorClient:
    """Calls with one deadline and our errors."""

    def __init__(self, channel: grpc.Channel, address: str) -> None:
        self.stub = operators_pb2_grpc.OperatorServiceStub(channel)
        self._address = address

    @classmethod
    @contextmanager
    def connect(cls, settings: CentralSettings) -> Iterator[OperatorClient]:
        """A client for the central of these settings; raises StorageError without its keys."""
        folder = settings.data_dir / "pki"
        try:
            ca, key, certificate = (
                (folder / name).read_bytes() for name in ("ca.pem", "operator.key", "operator.pem")
            )
        except OSError as error:
            raise StorageError(
                f"The operator's certificate cannot be read: {error.strerror} ({error.filename}). "
                "It is made by `central serve`; set CENTRAL_DATA_DIR to the directory that central "
                "serves from."
            ) from error
        host = "127.0.0.1" if settings.listen.host in WILDCARDS else settings.listen.host
        address = (
            f"[{host}]:{settings.listen.port}" if ":" in host else f"{host}:{settings.listen.port}"
        )
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        # Listings have no bound, and central is trusted. It is on this host: no proxy leads to it.
        options = [("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0)]
        with grpc.secure_channel(address, credentials, options) as channel:
            yield cls(channel, address)

    def ask(self, call: Callable[..., T], request: Message, timeout_s: float = CALL_TIMEOUT_S) -> T:
        """`call(request)` with a deadline; raises CentralUnreachable or CentralError."""
        try:
            return call(request, timeout=timeout_s)
        except grpc.RpcError as error:
            status: Any = error
            refused = any(key == REASON_KEY for key, _ in status.trailing_metadata() or ())
            if not refused and status.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            ):
                details = str(status.details())
                raise CentralUnreachable(
                    f"Central does not answer at {self._address} ({status.code().name}: "
                    f"{details}). {clock_advice(details) or _next_step(details)}"
                ) from error
            raise CentralError(str(status.details() or status.code().name)) from error


def clock_advice(details: str) -> str | None:
    """What to do when only a clock keeps a command from central; `details` are gRPC's words."""
    if not any(
        words in details for words in ("certificate is not yet valid", "certificate has expired")
    ):
        return None
    return (
        "Central's certificate is not valid now, and this machine's clock says "
        f"{wall_time():%Y-%m-%d %H:%M} UTC. Set the clock if it is wrong. If it was wrong when "
        "central started, start central again: it makes a new certificate."
    )


def _next_step(details: str) -> str:
    """What an operator does about a connection that failed with gRPC's `details`."""
    if "onnection refused" in details:
        return (
            "Start it with `central serve`, or set CENTRAL_LISTEN__PORT and CENTRAL_DATA_DIR as it "
            "has them."
        )
    if any(word in details for word in ("handshake", "certificate", "Socket closed")):
        return (
            "Something listens there, but TLS failed: set CENTRAL_DATA_DIR, which holds the "
            "certificates, and CENTRAL_LISTEN__PORT as central has them, and see that this "
            "machine's clock is right."
        )
    return (
        "See central's log, and that CENTRAL_LISTEN__HOST and CENTRAL_LISTEN__PORT are as it has "
        "them."
    )


def plain(message: Message) -> dict[str, Any]:
    """The message as JSON values.

    Every field is present, and None where it is optional and not set. Integers are numbers, and
    enum values are in lower case without their prefix.
    """
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_plain_value(item, field) for item in value]
    if entry is None and field.has_presence and not message.HasField(field.name):
        return None
    return _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
        return field.enum_type.values_by_number[value].name.removeprefix(prefix).lower()
    return value
