"""Raw TLS and HTTP/2 by hand: what a hostile client writes, and a node's library never would.

In: an address, certificates. Out: sockets and frames (RFC 9113). Every flood has an end in bytes
and in seconds.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Iterable
from contextlib import suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    9,
)
END_STREAM, END_HEADERS = 1, 4
FILLED = 64 << 10
"""Frames are written so many bytes at a time."""


def context(ca_pem: bytes, key_path: str = "", certificate_path: str = "") -> ssl.SSLContext:
    made = ssl.create_default_context(cadata=ca_pem.decode())
    made.check_hostname = False
    made.set_alpn_protocols(["h2"])
    if key_path:
        made.load_cert_chain(certificate_path, key_path)
    return made


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: bytes) -> bytes:
    """HPACK without index and Huffman (RFC 7541, 6.2.2); `name` has at most 126 bytes."""
    return b"\0" + _string(name.encode()) + _string(value)


def _string(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, out = len(text) - 127, bytearray([127])
    while rest >= 128:
        out.append(rest % 128 + 128)
        rest //= 128
    return bytes(out) + bytes([rest]) + text


def request_headers(path: str, *more: tuple[str, bytes]) -> bytes:
    """A header block that opens a gRPC call."""
    fields = [
        (":method", b"POST"),
        (":scheme", b"https"),
        (":path", path.encode()),
        (":authority", b"localhost"),
        ("te", b"trailers"),
        ("content-type", b"application/grpc"),
        *more,
    ]
    return b"".join(literal(name, value) for name, value in fields)


def connect(
    port: int, tls: ssl.SSLContext, *, preface: bool = True, timeout_s: float = 5.0
) -> ssl.SSLSocket:
    """A connection after its TLS handshake, and after HTTP/2's preface if wished."""
    raw = socket.create_connection(("127.0.0.1", port), timeout_s)
    try:
        wrapped = tls.wrap_socket(raw, server_hostname="localhost")
    except BaseException:
        raw.close()
        raise
    if preface:
        wrapped.sendall(PREFACE + frame(SETTINGS))
    return wrapped


def flood(
    connection: ssl.SSLSocket,
    frames: Iterable[bytes],
    seconds: float,
    limit_bytes: int = 1 << 30,
    *,
    reads: bool = False,
) -> int:
    """Write frames until central hangs up or an end is reached; returns the bytes that it took.

    `reads`: its answers are read and dropped.
    """
    sent, piece, ends = 0, bytearray(), time.monotonic() + seconds
    with suppress(OSError):
        for one in frames:
            piece += one
            if len(piece) >= FILLED:
                connection.sendall(piece)
                sent += len(piece)
                piece.clear()
                if reads:
                    _drain(connection)
                if time.monotonic() > ends or sent >= limit_bytes:
                    break
        connection.sendall(piece)
    return sent


def _drain(connection: ssl.SSLSocket) -> None:
    """Read what is there; raises OSError when central has hung up."""
    before = connection.gettimeout()
    connection.settimeout(0)
    try:
        while True:
            if not connection.recv(1 << 16):
                raise ConnectionResetError
    except (ssl.SSLWantReadError, BlockingIOError):
        pass
    finally:
        connection.settimeout(before)


def hung_up(connection: ssl.SSLSocket, seconds: float) -> bool:
    """Whether central ends the connection within so long; what it writes is dropped."""
    ends = time.monotonic() + seconds
    while (left := ends - time.monotonic()) > 0:
        connection.settimeout(left)
        try:
            if not connection.recv(1 << 16):
                return True
        except TimeoutError:
            return False
        except OSError:
            return True
    return False
