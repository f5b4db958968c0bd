"""The signed end of the journal: a head.

In: the number and hash of an event, central's release key. Out: a signature ("seal") that nobody
without the key can make, and the head, which names an event and carries its seal. Guarantee: the
hash of an event covers every event before it, so a seal speaks for the whole journal up to its
event.
"""

from __future__ import annotations

import base64
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from pydantic import Field

from protos.manifest import Digest, Document, ManifestError, canonical_json, verify


class Head(Document):
    """The last event of the journal when this was written. Number 0: the journal has none yet."""

    sequence: int = Field(ge=0)
    hash: Digest
    seal: str
    """Signature over number and hash, base64."""


class Seals(Protocol):
    """What a journal asks for when it appends."""

    def seal(self, sequence: int, digest: str) -> Head:
        """The signed head for an event that is about to be recorded."""
        ...

    def keep(self, head: Head) -> None:
        """Keep the head of what was recorded outside of the database; must not raise."""
        ...


def sign_head(key: ec.EllipticCurvePrivateKey, sequence: int, digest: str) -> Head:
    """Signs the same head with the same bytes each time (RFC 6979)."""
    signature = key.sign(_body(sequence, digest), ec.ECDSA(SHA256(), deterministic_signing=True))
    return Head(sequence=sequence, hash=digest, seal=base64.b64encode(signature).decode())


def verify_seal(public_key_pem: bytes, sequence: int, digest: str, seal: str) -> None:
    """Raises ManifestError unless `seal` is the key's signature for this event."""
    try:
        signature = base64.b64decode(seal, validate=True)
    except ValueError as error:
        raise ManifestError(f"The seal of event {sequence} is not base64.") from error
    verify(public_key_pem, _body(sequence, digest), signature)


def _body(sequence: int, digest: str) -> bytes:
    # It names what it is: the same key signs releases and receipts.
    return canonical_json({"document": "journal-head", "hash": digest, "sequence": sequence})
