"""Central's keys and certificates.

In: a data directory and the names that nodes call central by. Out: the CA, the server's
certificate, the release key, the operator's certificate, and certificates for nodes. Guarantees:
every file is written whole; a directory that a kill left half filled at the first start is
completed; a key that nodes rely on is never replaced; keys are readable by their owner only. All
keys are ECDSA P-256.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from central.disk import make_directory, storage, write_file
from central.errors import SettingsError, StorageError
from central.fleet.identity import node_uri, operator_uri
from lorikeet.clock import wall_time
from lorikeet.durable import remove_temporary_files
from protos.manifest import sha256_hex

CA_LIFE = timedelta(days=3650)
CERTIFICATE_LIFE = timedelta(days=1825)
RENEW_BEFORE = timedelta(days=90)
BACKDATE = timedelta(days=30)
"""Certificates are valid from so long before they are made.

Central's clock may have been ahead, and a node's may be behind.
"""
LOCAL_NAMES = ("localhost", "127.0.0.1")
RELIED_ON = {"ca.key": "ca.pem", "release.key": "release.pub.pem"}
"""Keys that nodes have pinned, with their public parts. Other lost keys are made anew."""


@dataclass(frozen=True)
class Pki:
    """Everything in `<data_dir>/pki`, loaded."""

    ca_key: ec.EllipticCurvePrivateKey
    ca_certificate: x509.Certificate
    ca_pem: bytes
    server_key_pem: bytes
    server_certificate_pem: bytes
    release_key: ec.EllipticCurvePrivateKey
    release_key_pem: bytes
    """Public part, PEM: verifies release manifests and receipts."""

    @classmethod
    def load_or_create(
        cls, data_dir: Path, names: Sequence[str], served_before: bool = False
    ) -> Pki:
        """Read the directory, making what is absent; raises StorageError.

        `served_before`: this central has a history, so nodes rely on its CA and its release key,
        and those must be there.
        """
        folder = data_dir / "pki"
        for name, public in RELIED_ON.items():
            _expect_kept(folder / name, folder / public, served_before)
        make_directory(folder)
        with storage(folder):
            remove_temporary_files(folder)
            ca_key = _key(folder / "ca.key")
            ca = _ca_certificate(folder / "ca.pem", ca_key)
            _expect_valid(folder / "ca.pem", ca)
            issuer = _Issuer(ca_key, ca)
            server_key = _key(folder / "server.key")
            server = _server_certificate(
                folder / "server.pem", server_key, issuer, (*LOCAL_NAMES, *names)
            )
            release_key = _key(folder / "release.key")
            release_pem = public_pem(release_key.public_key())
            kept = folder / "release.pub.pem"
            if kept.is_file() and kept.read_bytes() != release_pem:
                raise _other_key(folder / "release.key", kept)
            _operator_certificate(folder / "operator.pem", _key(folder / "operator.key"), issuer)
        made = cls(
            ca_key=ca_key,
            ca_certificate=ca,
            ca_pem=ca.public_bytes(Encoding.PEM),
            server_key_pem=_key_pem(server_key),
            server_certificate_pem=server.public_bytes(Encoding.PEM),
            release_key=release_key,
            release_key_pem=release_pem,
        )
        if not served_before:
            made.keep_public_parts(data_dir)
        return made

    def keep_public_parts(self, data_dir: Path) -> None:
        """Write ca.pem and release.pub.pem when they are absent; raises StorageError.

        A central with a history calls this only after the history was checked against both keys.
        Otherwise the public part of a swapped key would take the place of the lost file.
        """
        for name, pem in (("ca.pem", self.ca_pem), ("release.pub.pem", self.release_key_pem)):
            path = data_dir / "pki" / name
            if not path.is_file():
                write_file(path, pem)

    @property
    def identity(self) -> str:
        """Who this central is, for as long as it keeps its CA's key.

        A backup, a restore or a move of its stores does not change it.
        """
        return identity_of(self.ca_certificate)

    def issue_node_certificate(
        self, node_id: str, cohort: str, public_key: ec.EllipticCurvePublicKey
    ) -> bytes:
        """PEM certificate that names node and cohort."""
        issuer = _Issuer(self.ca_key, self.ca_certificate)
        return _client_certificate(
            issuer, node_id, node_uri(node_id, cohort), public_key
        ).public_bytes(Encoding.PEM)


@dataclass(frozen=True)
class _Issuer:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def public_pem(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo in PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def identity_of(ca: x509.Certificate) -> str:
    """SHA-256 of a CA's public key: the central's identity."""
    return sha256_hex(ca.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    if not path.is_file():
        write_file(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))
    try:
        with storage(path):
            data = path.read_bytes()
        key = load_pem_private_key(data, password=None)
    except ValueError as error:
        raise StorageError(
            f"{path} is not a private key in PEM: {error}. Restore it from a backup."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise StorageError(
            f"{path} holds a {type(key).__name__}; expected an ECDSA P-256 key. Restore it from a "
            "backup."
        )
    return key


def _expect_kept(path: Path, public: Path, served_before: bool) -> None:
    """Raises StorageError for a lost key: nodes would refuse whatever a new one signs."""
    with storage(path):
        if path.is_file() or not (served_before or public.is_file()):
            return
    raise StorageError(
        f"{path} is lost, and nodes trust no other: they would refuse this central and its "
        "releases. Expected the key that this central was started with. Copy it there from a "
        f"backup ({'backups/<time>/pki/' + path.name}) or from where you keep the keys, with mode "
        "0600."
    )


def _other_key(path: Path, public: Path) -> StorageError:
    return StorageError(
        f"{path} is not the key of {public}: one of the two was replaced, and nodes trust only the "
        "pair that they enrolled with. Restore both from one backup."
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _ca_certificate(path: Path, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """The CA's certificate; when the file is absent, a new one that is not written yet."""
    known = _load(path, key.public_key())
    if known is not None:
        return known
    if path.is_file():
        raise _other_key(path.with_name("ca.key"), path)
    name = _name("Lorikeet central CA")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(name, name, key.public_key(), CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )


def _server_certificate(
    path: Path, key: ec.EllipticCurvePrivateKey, issuer: _Issuer, names: Sequence[str]
) -> x509.Certificate:
    alternatives = x509.SubjectAlternativeName(
        [_general_name(name) for name in dict.fromkeys(names)]
    )
    known = _load(path, key.public_key())
    if known is not None and _alternatives(known) == alternatives and not _must_be_renewed(known):
        return known
    certificate = (
        _builder(
            _name("Lorikeet central"),
            issuer.certificate.subject,
            key.public_key(),
            CERTIFICATE_LIFE,
        )
        .add_extension(alternatives, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(issuer.key, SHA256())
    )
    write_file(path, certificate.public_bytes(Encoding.PEM))
    return certificate


def _operator_certificate(path: Path, key: ec.EllipticCurvePrivateKey, issuer: _Issuer) -> None:
    known = _load(path, key.public_key())
    if known is None or _must_be_renewed(known):
        certificate = _client_certificate(
            issuer, "operator", operator_uri("operator"), key.public_key()
        )
        write_file(path, certificate.public_bytes(Encoding.PEM))


def _client_certificate(
    issuer: _Issuer, common_name: str, uri: str, public_key: ec.EllipticCurvePublicKey
) -> x509.Certificate:
    return (
        _builder(_name(common_name), issuer.certificate.subject, public_key, CERTIFICATE_LIFE)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(issuer.key, SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, life: timedelta
) -> x509.CertificateBuilder:
    now = wall_time()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + life)
    )


def _load(path: Path, public_key: ec.EllipticCurvePublicKey) -> x509.Certificate | None:
    """The certificate at `path` if it belongs to the key."""
    if not path.is_file():
        return None
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise StorageError(
            f"{path} is not a certificate in PEM: {error}. Restore it from a backup."
        ) from error
    return certificate if certificate.public_key() == public_key else None


def _alternatives(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None


def _must_be_renewed(certificate: x509.Certificate) -> bool:
    """It runs out soon, or was made when central's clock was far ahead."""
    now = wall_time()
    return (
        certificate.not_valid_after_utc - now < RENEW_BEFORE
        or certificate.not_valid_before_utc > now
    )


def _expect_valid(path: Path, ca: x509.Certificate) -> None:
    """Raises StorageError for a certificate that is not valid now.

    Every node trusts exactly this certificate, so central cannot make another one.
    """
    begins, ends, now = ca.not_valid_before_utc, ca.not_valid_after_utc, wall_time()
    if begins <= now < ends:
        return
    raise StorageError(
        f"{path} is valid from {begins:%Y-%m-%d %H:%M} to {ends:%Y-%m-%d %H:%M} UTC, and this "
        f"machine's clock says {now:%Y-%m-%d %H:%M}: no node would trust central. Set the clock if "
        "it is wrong. If the clock was wrong when the file was made, or the file has run out, "
        f"move {path.parent} away: central makes new keys, and every node enrols anew."
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise SettingsError(
            f"CENTRAL_LISTEN__NAMES: {name!r} is not a DNS name or address. Expected ASCII; write "
            "a name of another script in its xn-- form."
        ) from error


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
