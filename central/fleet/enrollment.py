"""EnrollmentService: a join token and a certificate request go in, a node's identity comes out.

Guarantees: the node's key never comes here; enrolling again with the same key, name and token gives
the same node id (a node whose answer was lost tries again, even when that was the token's last
use); a node with another base model is refused; a key belongs to one node; a revoked key is never
enrolled again, a revoked name only with a token that readmits it. A refused caller waits for its
answer (guesses.py), so that secrets are not guessed by the thousand; who has the right one waits
two seconds at most.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec

from central.blobs import BlobStore
from central.errors import Reason, Refused
from central.fleet.guesses import Guesses
from central.fleet.pki import Pki, public_pem
from central.fleet.tokens import expect_usable, find_token
from central.journal import EventKind, Journal, NewEvent, NodeRecord, State, TokenRecord
from central.releases.service import signed_manifest
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.manifest import sha256_hex

log = logging.getLogger(__name__)
NODE_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,46}[A-Za-z0-9])?")


class EnrollmentService(fleet_pb2_grpc.EnrollmentServiceServicer):
    """Served on the enrolment port, where callers have no certificate yet."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        pki: Pki,
        base: str,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        """`base` is the digest of central's base model."""
        self._journal = journal
        self._blobs = blobs
        self._pki = pki
        self._base = base
        self._clock = clock or journal.now
        self._guesses = Guesses()

    async def Enroll(
        self, request: fleet_pb2.EnrollRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> fleet_pb2.EnrollResponse:
        await self._guesses.wait_to_ask(context.peer())
        try:
            return await asyncio.to_thread(self.enroll, request)
        except Refused:
            await self._guesses.wait(context.peer())
            raise

    def enroll(self, request: fleet_pb2.EnrollRequest) -> fleet_pb2.EnrollResponse:
        """The blocking part; raises Refused."""
        with self._journal.read() as state:
            token = find_token(state, request.token_id, request.token_secret)
            self._check(request)
            key = _read_request(request.csr_pem)
            pem = public_pem(key).decode()
            node_id = f"{request.node_name}-{sha256_hex(pem.encode())[:8]}"
            known = state.nodes.get(node_id)
            certificate = self._pki.issue_node_certificate(node_id, token.cohort, key)
            if known is None or known.public_key_pem != pem:
                expect_usable(token, self._clock())
                _expect_free_key(state, pem)
                _expect_free_name(state, request.node_name, token)
                body = {
                    "name": request.node_name,
                    "token_id": token.token_id,
                    "public_key_pem": pem,
                    "base": request.base_digest,
                    "certificate_sha256": sha256_hex(certificate),
                }
                self._journal.append(NewEvent(EventKind.NODE_ENROLLED, token.cohort, node_id, body))
                log.info("node enrolled", extra={"node_id": node_id, "cohort": token.cohort})
            else:
                _expect_same(known, token.cohort)
            genesis = state.genesis(token.cohort)
        return fleet_pb2.EnrollResponse(
            node_id=node_id,
            cohort=token.cohort,
            certificate_pem=certificate,
            ca_pem=self._pki.ca_pem,
            release_key_pem=self._pki.release_key_pem,
            genesis=signed_manifest(genesis),
            genesis_payload=self._blobs.read(genesis.manifest.payload.digest_sha256),
        )

    def _check(self, request: fleet_pb2.EnrollRequest) -> None:
        if not NODE_NAME.fullmatch(request.node_name):
            raise _bad(
                f"Node name {request.node_name!r} is not usable. Expected 1 to 48 letters, digits, "
                "'.', '_' or '-'. Set EDGE_NODE_NAME."
            )
        if request.base_digest != self._base:
            raise Refused(
                grpc.StatusCode.FAILED_PRECONDITION,
                Reason.OTHER_BASE,
                f"The node's base model has digest {request.base_digest or 'none'}; central's has "
                f"{self._base}. Point EDGE_BASE__PATH at exactly the base model that central uses.",
            )


def _read_request(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        request = x509.load_pem_x509_csr(pem)
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise _bad(
            "The certificate request is not readable. Expected PEM, as `edge-node enroll` makes it."
        ) from error
    if (
        not signed
        or not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(key.curve, ec.SECP256R1)
    ):
        raise _bad(
            "The certificate request is not signed by an ECDSA P-256 key of its own. Use "
            "`edge-node enroll`."
        )
    return key


def _expect_free_key(state: State, pem: str) -> None:
    """Refuse a key that a node has; a revoked one must not come back under another name."""
    for node in state.nodes.values():
        if node.public_key_pem != pem:
            continue
        if node.revoked:
            raise _revoked(node)
        raise Refused(
            grpc.StatusCode.ALREADY_EXISTS,
            Reason.KEY_TAKEN,
            f"This key is enrolled as node {node.node_id}. Set EDGE_NODE_NAME back to "
            f"{node.name!r}, or remove the node's identity directory to enrol with a new key.",
        )


def _expect_free_name(state: State, name: str, token: TokenRecord) -> None:
    # The owner may be of another cohort, so nothing more is said of it.
    owners = [node for node in state.nodes.values() if node.name.casefold() == name.casefold()]
    readmits = state.nodes[token.readmits].name.casefold() if token.readmits else None
    if owners and all(node.revoked for node in owners):
        if readmits == name.casefold():
            return
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.REVOKED_NODE,
            f"A node of the name {name!r} was revoked. The operator of central can let it come "
            "back with `central tokens create --readmit NODE_ID`; or choose another "
            "EDGE_NODE_NAME.",
        )
    if owners:
        raise Refused(
            grpc.StatusCode.ALREADY_EXISTS,
            Reason.NAME_TAKEN,
            f"Node name {name!r} belongs to a node with another key. Choose another "
            "EDGE_NODE_NAME, or have the operator revoke that node.",
        )


def _expect_same(known: NodeRecord, cohort: str) -> None:
    if known.revoked:
        raise _revoked(known)
    if known.cohort != cohort:
        raise Refused(
            grpc.StatusCode.PERMISSION_DENIED,
            Reason.COHORT_MISMATCH,
            f"Node {known.node_id} is enrolled in another cohort than {cohort!r}. A node has one "
            "cohort: use a token of its own cohort, or enrol with a new key.",
        )


def _revoked(node: NodeRecord) -> Refused:
    return Refused(
        grpc.StatusCode.PERMISSION_DENIED,
        Reason.REVOKED_NODE,
        f"Node {node.node_id} was revoked, and its key is never enrolled again. The operator of "
        "central can let its site come back with `central tokens create --readmit "
        f"{node.node_id}`; then remove the node's identity directory and enrol with that token.",
    )


def _bad(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, Reason.BAD_ARGUMENT, message)
