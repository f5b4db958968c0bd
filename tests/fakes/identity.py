"""An identity directory as enrolment leaves it, without central. Keys and certificate are real."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import NameOID

from edge_node.disk import write_file
from edge_node.identity import Identity, keep_identity

NODE_ID = "node-a-0badcafe"

LIFETIME = timedelta(days=60)
"""Of the certificate: far enough from its end to be no problem."""


def make_identity(data_dir: Path, base: str = "b" * 64) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NODE_ID)])
    now = datetime.now(UTC)
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + LIFETIME)
    pem = certificate.sign(key, SHA256()).public_bytes(Encoding.PEM)
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    release_key = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    identity = Identity(NODE_ID, "shared", base, key, pem, pem, release_key)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_file(data_dir / "identity" / "node.key", private, mode=0o600)
    keep_identity(data_dir, identity)
    return identity
