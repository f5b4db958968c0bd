"""Who is calling: the URI name in the peer's certificate, checked against the journal.

In: a gRPC call over mutual TLS. Out: the enrolled node, or the operator's name. Guarantee: node and
cohort come from the certificate and the journal, never from a message; a revoked node is refused,
and so is a certificate whose time is over, though TLS looks at it only when a connection begins.
Long calls ask again on their way (`Permission`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from central.errors import Reason, Refused
from central.journal import Journal, NodeRecord

SCHEME = "lorikeet"
ASK_S = 1.0
"""A stream may go on this long after its node was revoked, while bytes flow."""


@dataclass(frozen=True)
class Peer:
    """What a client certificate says."""

    kind: Literal["node", "operator"]
    name: str
    cohort: str
    public_key_pem: str
    not_after: datetime
    """End of the certificate, UTC."""


class Authenticator:
    """Names the caller of a call; raises Refused."""

    def __init__(
        self, journal: Journal, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._journal = journal
        self._clock = clock

    def peer(self, context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
        """What the caller's certificate says; raises Refused when it is not ours or is over."""
        peer = read_peer(context)
        self.expect_in_time(peer)
        return peer

    def expect_in_time(self, peer: Peer) -> None:
        """Raises Refused when the certificate has ended."""
        if self._clock() >= peer.not_after:
            raise Refused(
                grpc.StatusCode.UNAUTHENTICATED,
                Reason.CERTIFICATE_EXPIRED,
                f"The certificate of {peer.kind} {peer.name} ended at "
                f"{peer.not_after:%Y-%m-%dT%H:%M:%SZ}. A node gets another one when "
                "identity/identity.json is removed from its data directory and it enrols again "
                "with a join token of its cohort; its key and id stay. An operator's certificate "
                "is made anew when central starts.",
            )

    async def node(self, context: grpc.aio.ServicerContext[Any, Any]) -> NodeRecord:
        """The enrolled, not revoked node that calls."""
        return await asyncio.to_thread(self.enrolled, self.peer(context))

    def enrolled(self, peer: Peer) -> NodeRecord:
        """The node record behind a certificate that has not ended."""
        self.expect_in_time(peer)
        with self._journal.read() as state:
            node = state.nodes.get(peer.name) if peer.kind == "node" else None
        if node is None or node.public_key_pem != peer.public_key_pem:
            raise Refused(
                grpc.StatusCode.UNAUTHENTICATED,
                Reason.UNKNOWN_NODE,
                f"{peer.kind.capitalize()} {peer.name!r} is not an enrolled node here. Enrol with "
                "`edge-node enroll`.",
            )
        if node.revoked:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                Reason.REVOKED_NODE,
                f"Node {node.node_id} was revoked. The operator of central can let its site come "
                f"back with `central tokens create --readmit {node.node_id}`; then remove the "
                "node's identity directory and enrol with that token.",
            )
        if node.cohort != peer.cohort:
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                Reason.COHORT_MISMATCH,
                f"The certificate of node {node.node_id} says cohort {peer.cohort!r}; it was "
                f"enrolled in {node.cohort!r}.",
            )
        return node

    def operator(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """The calling operator's name."""
        peer = self.peer(context)
        if peer.kind != "operator":
            raise Refused(
                grpc.StatusCode.PERMISSION_DENIED,
                Reason.NOT_OPERATOR,
                f"{peer.name!r} is a node. This call needs the operator's certificate, "
                "pki/operator.pem at central.",
            )
        return peer.name


class Permission:
    """Whether the caller of a long call may go on.

    Its certificate may end, or its node be revoked, during the call.
    """

    def __init__(self, authenticator: Authenticator, peer: Peer) -> None:
        self._authenticator = authenticator
        self._peer = peer
        self._ask_at = asyncio.get_running_loop().time() + ASK_S

    async def expect(self) -> None:
        """Raises Refused when the caller may not go on. Cheap: asks the journal once in `ASK_S`."""
        self._authenticator.expect_in_time(self._peer)
        if (now := asyncio.get_running_loop().time()) >= self._ask_at:
            self._ask_at = now + ASK_S
            await asyncio.to_thread(self._authenticator.enrolled, self._peer)


def node_uri(node_id: str, cohort: str) -> str:
    """URI name of a node's certificate."""
    return f"{SCHEME}://node/{node_id}?cohort={cohort}"


def operator_uri(name: str) -> str:
    """URI name of an operator's certificate."""
    return f"{SCHEME}://operator/{name}"


def read_peer(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """What the caller's certificate says; TLS has checked that our CA signed it. Raises Refused."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
    try:
        return parse_certificate(pem)
    except (ValueError, KeyError, x509.ExtensionNotFound) as error:
        raise Refused(
            grpc.StatusCode.UNAUTHENTICATED,
            Reason.UNKNOWN_NODE,
            "The client certificate names neither a node nor an operator. Expected one that "
            "central issued.",
        ) from error


@lru_cache(maxsize=4096)  # every call of a connection shows the same one
def parse_certificate(pem: bytes) -> Peer:
    """Raises ValueError, KeyError or ExtensionNotFound when it is not one of ours."""
    certificate = x509.load_pem_x509_certificate(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
    parts = urlsplit(uri)
    kind, name = parts.netloc, parts.path.removeprefix("/")
    if parts.scheme != SCHEME or not name:
        raise ValueError(f"Certificate names {uri!r}.")
    key = (
        certificate.public_key()
        .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode()
    )
    if kind == "node":
        return Peer(
            "node", name, parse_qs(parts.query)["cohort"][0], key, certificate.not_valid_after_utc
        )
    if kind == "operator":
        return Peer("operator", name, "", key, certificate.not_valid_after_utc)
    raise ValueError(f"Certificate names {uri!r}.")
