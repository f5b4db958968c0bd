"""Certificates of an endpoint on this machine."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def make_certificate(folder: Path, serial: int = 1) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key. They replace those in `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    )
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), serial, now, now + timedelta(days=1)
    )
    signed = builder.add_extension(names, critical=False).sign(key, SHA256())
    certificate, private = folder / "tls.pem", folder / "tls.key"
    for file, data in (
        (certificate, signed.public_bytes(Encoding.PEM)),
        (private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())),
    ):
        new = file.with_suffix(".new")
        new.write_bytes(data)
        new.replace(file)
    return certificate, private
