"""Who this node is: its key, its certificate, and its enrolment at central.

In: a join token, once. Out: an `Identity`, whose `channel` speaks mutual TLS to central. The
private key is made here, is readable by its owner only and never leaves the data directory.
Enrolment may be repeated after any crash: the same key and name get the same node id, and
`identity.json` is written last.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from edge_node.certificate import invalidity, validity
from edge_node.disk import parse_json, read_json, write_file
from edge_node.errors import CentralUnreachable, EnrollmentError, StorageError
from edge_node.settings import EdgeSettings
from protos.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from protos.releases.v1 import releases_pb2

TOKEN_PREFIX = "lkt1."
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
REFUSALS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
)
"""Central's answers that another try does not change."""


@dataclass(frozen=True)
class JoinToken:
    """What `central tokens create` printed: who may join, and the only CA that the node trusts."""

    token_id: str
    secret: str
    ca_pem: bytes

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Raises EnrollmentError when `text` is not a join token."""
        try:
            body = text.strip().removeprefix(TOKEN_PREFIX)
            document = parse_json(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            token = cls(str(document["id"]), str(document["secret"]), str(document["ca"]).encode())
            x509.load_pem_x509_certificate(token.ca_pem)
        except (ValueError, KeyError, TypeError) as error:
            raise EnrollmentError(
                f"The join token ({len(text)} characters) is not readable. Expected the whole "
                f"line that `central tokens create` printed, starting with {TOKEN_PREFIX!r}. Set "
                "EDGE_CENTRAL__JOIN_TOKEN."
            ) from error
        return token


@dataclass(frozen=True)
class Identity:
    """An enrolled node. Cohort and node id are those in the certificate."""

    node_id: str
    cohort: str
    base: str
    key: ec.EllipticCurvePrivateKey
    certificate_pem: bytes
    ca_pem: bytes
    release_key_pem: bytes

    @classmethod
    def load(cls, data_dir: Path) -> Identity:
        """Raises EnrollmentError when not enrolled, StorageError when files cannot be read."""
        folder = data_dir / "identity"
        try:
            document = read_json(folder / "identity.json")
        except (FileNotFoundError, NotADirectoryError):
            raise EnrollmentError(
                f"This node is not enrolled: {folder / 'identity.json'} does not exist. Run "
                "`edge-node enroll` with EDGE_CENTRAL__JOIN_TOKEN set to a token from `central "
                "tokens create`."
            ) from None
        except (OSError, ValueError) as error:
            raise _damaged(folder, error) from error
        try:
            for field in ("node_id", "cohort", "base"):
                if not isinstance(document[field], str):
                    raise TypeError(f"{field} is {document[field]!r}; expected a text")
            key = _read_key(folder / "node.key")
            certificate_pem = (folder / "node.pem").read_bytes()
            _expect_name(certificate_pem)
            return cls(
                node_id=document["node_id"],
                cohort=document["cohort"],
                base=document["base"],
                key=key,
                certificate_pem=certificate_pem,
                ca_pem=(folder / "ca.pem").read_bytes(),
                release_key_pem=(folder / "release.pub.pem").read_bytes(),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, error) from error

    def channel(self, settings: EdgeSettings) -> grpc.aio.Channel:
        """A mutual-TLS channel to central; reconnects by itself."""
        key_pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        credentials = grpc.ssl_channel_credentials(self.ca_pem, key_pem, self.certificate_pem)
        return open_channel(settings.central.address, credentials)


@dataclass(frozen=True)
class Enrollment:
    """What central answered: the identity, and the cohort's first release with its payload."""

    identity: Identity
    genesis: releases_pb2.SignedManifest
    genesis_payload: bytes


async def request_enrollment(settings: EdgeSettings, base_digest: str) -> Enrollment:
    """Ask central for a certificate; nothing but the key is written yet.

    Raises:
        EnrollmentError: no token, or central refused; the message is central's.
        CentralUnreachable: central did not answer, or could not at the moment; later it may.
        StorageError: the key cannot be kept.
    """
    if settings.central.join_token is None:
        raise EnrollmentError(
            "This node is not enrolled and has no join token. Ask the operator for one (`central "
            "tokens create`) and set EDGE_CENTRAL__JOIN_TOKEN."
        )
    token = JoinToken.parse(settings.central.join_token.get_secret_value())
    key = _own_key(settings.data_dir / "identity")
    request = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, settings.node_name)])
    )
    address = settings.central.enrollment_address
    async with open_channel(address, grpc.ssl_channel_credentials(token.ca_pem)) as channel:
        try:
            answer: fleet_pb2.EnrollResponse = await fleet_pb2_grpc.EnrollmentServiceStub(
                channel
            ).Enroll(
                fleet_pb2.EnrollRequest(
                    token_id=token.token_id,
                    token_secret=token.secret,
                    csr_pem=request.sign(key, SHA256()).public_bytes(Encoding.PEM),
                    base_digest=base_digest,
                    node_name=settings.node_name,
                ),
                timeout=settings.central.call_timeout_s,
            )
        except grpc.aio.AioRpcError as error:
            if error.code() in REFUSALS:
                raise EnrollmentError(
                    f"Central refused to enrol this node: {error.details()}"
                ) from error
            advice = clock_advice(error.details() or "") or (
                "Check EDGE_CENTRAL__ENROLLMENT_ADDRESS, the network with its proxies, both "
                "clocks, and that `central serve` runs; its certificate must name this host "
                "(CENTRAL_LISTEN__NAMES)."
            )
            raise CentralUnreachable(
                f"Central did not enrol this node at {address}: {error.code().name}: "
                f"{error.details()}. {advice}"
            ) from error
    identity = Identity(
        node_id=answer.node_id,
        cohort=answer.cohort,
        base=base_digest,
        key=key,
        certificate_pem=answer.certificate_pem,
        ca_pem=answer.ca_pem,
        release_key_pem=answer.release_key_pem,
    )
    return Enrollment(identity, answer.genesis, answer.genesis_payload)


def clock_advice(
    details: str, certificate_pem: bytes | None = None, now: datetime | None = None
) -> str | None:
    """What to do when clocks, and not an address, keep a node from central; None when they do not.

    `details` are gRPC's words for a call that failed. `certificate_pem` is the node's own
    certificate, if it has one.
    """
    now = now or datetime.now(UTC)
    says = f"this node's clock says {now:%Y-%m-%d %H:%M} UTC"
    if any(
        words in details for words in ("certificate is not yet valid", "certificate has expired")
    ):
        return (
            f"Central's certificate is not valid now, and {says}. Compare it with central's clock, "
            "and set the one that is wrong."
        )
    if certificate_pem is None:
        return None
    if (wrong := invalidity(certificate_pem, now)) is not None:
        return " ".join(wrong)
    if "Socket closed" in details:
        return (
            f"Central closed the connection. {validity(certificate_pem)}, and {says}: if central's "
            "clock says a time outside of that, set it. Otherwise central may have as many "
            "connections as it takes; its log says so."
        )
    return None


def open_channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    """A channel to `address` that reconnects by itself. Only to this host it takes no proxy."""
    own = (("grpc.enable_http_proxy", 0),) if _is_this_host(address) else ()
    return grpc.aio.secure_channel(address, credentials, options=(*CHANNEL_OPTIONS, *own))


def _is_this_host(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]").lower()
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", socket.gethostname().lower())
    try:  # only an address of this host can be bound
        with socket.socket(
            socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
        ) as probe:
            probe.bind((host, 0))
    except OSError:
        return ip.is_loopback
    return True


def keep_identity(data_dir: Path, identity: Identity) -> None:
    """Write the identity durably. `identity.json` is last: a node is enrolled or it is not."""
    folder = data_dir / "identity"
    write_file(folder / "node.pem", identity.certificate_pem)
    write_file(folder / "ca.pem", identity.ca_pem)
    write_file(folder / "release.pub.pem", identity.release_key_pem)
    document = {"node_id": identity.node_id, "cohort": identity.cohort, "base": identity.base}
    write_file(folder / "identity.json", json.dumps(document, indent=1).encode())


def _own_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    path = folder / "node.key"
    if not path.is_file():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_file(path, pem, mode=0o600)
    try:
        return _read_key(path)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _expect_name(certificate_pem: bytes) -> None:
    """Raises ValueError for what is no certificate, or names no node."""
    subject = x509.load_pem_x509_certificate(certificate_pem).subject
    if not subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        raise ValueError("node.pem has no common name; expected the node's")


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = path.read_bytes()
    try:
        loaded = load_pem_private_key(data, password=None)
    except ValueError as error:
        raise ValueError(f"{path} holds no private key in PEM") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{path} holds a {type(loaded).__name__}; expected an ECDSA P-256 key")
    return loaded


def _damaged(folder: Path, error: Exception) -> StorageError:
    return StorageError(
        f"The identity in {folder} cannot be read ({type(error).__name__}: {error}). Restore it, "
        f"or move {folder} away and enrol anew with a new token."
    )
