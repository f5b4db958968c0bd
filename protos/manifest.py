"""Signed documents that cross the wire: manifests of updates and releases, and receipts.

In: field values. Out: canonical JSON bytes (UTF-8, sorted keys, no spaces), their SHA-256 (the
document's id), and ECDSA P-256 signatures over exactly those bytes. Both sides sign and verify the
bytes as sent and never re-serialise, so an id never depends on a library's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from protos.encoding import Encoding

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 as 64 lower-case hex digits."""

CHUNK_BYTES = 128 << 10
"""Bytes of a payload in one message, both ways.

With larger messages a server of hundreds holds more memory and is not faster (benchmarks.intake).
"""


class ManifestError(ValueError):
    """A signed document is malformed or its signature does not fit; nothing was accepted."""


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; refuses NaN and infinity (ValueError)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


class Document(BaseModel):
    """A frozen record with one canonical byte form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes: the document's id."""
        return sha256_hex(self.to_bytes())

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copy = super().model_copy(update=update, deep=deep)
        copy.__dict__.pop("digest", None)  # pydantic copies what was cached too
        return copy

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Parse `data`; raises ManifestError when it is not this document in canonical form."""
        try:
            document = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise ManifestError(
                f"{cls.__name__} is malformed at {where}: {first['msg']}."
            ) from error
        try:
            canonical = document.to_bytes()
        except ValueError as error:  # NaN or infinity, which JSON does not have
            raise ManifestError(
                f"{cls.__name__} has a value without a canonical form: {error}."
            ) from error
        if canonical != data:
            raise ManifestError(
                f"{cls.__name__} is not in canonical form (sorted keys, no spaces, no defaults "
                "left out)."
            )
        return document


class Payload(Document):
    """The safetensors file that a manifest speaks of (protos.lora)."""

    digest_sha256: Digest
    size_bytes: int = Field(ge=1)


class Start(Document):
    """The release an update was trained on, by the exact bytes."""

    release: Digest
    payload: Digest
    prefix_rank: int = Field(ge=0)
    """Rank of the prefix of the release that was used; the release's own rank when whole."""
    dtype: Literal["float32", "bfloat16", "float16"]


class UpdateManifest(Document):
    """What a node says of one update. The cohort is in the node's certificate, not here."""

    schema_version: Literal[1] = 1
    node_id: str = Field(min_length=1, max_length=64)
    sequence: int = Field(ge=1, lt=2**63)
    """Counts the node's updates; the newer supersedes the older from the same start."""
    base: Digest
    start: Start
    rank: int = Field(ge=1)
    """Largest rank of any module."""
    payload: Payload
    encoding: Encoding = Field(default="float32", exclude_if=lambda encoding: encoding == "float32")
    """How the payload holds the factors; anything but float32 only where central offers it."""
    encoding_error: float = Field(default=0.0, ge=0, lt=1, exclude_if=lambda error: error == 0)
    """||sent - trained||_F / ||trained||_F of the increment, as the node measured it."""
    sections: list[str] = Field(default_factory=list)
    """Names of further sections in the payload (none is used today), sorted."""
    supersedes: Digest | None = None
    round_id: str = Field(min_length=1, max_length=64)
    experiences: int = Field(ge=0, lt=2**63)
    """For reports only: central never derives a weight from what a node claims."""
    metrics: dict[str, float] = Field(default_factory=dict)
    created_at: str
    software: str


class Composition(Document):
    """How a release that builds on another cohort is composed: trunc_R(P_other + P_own)."""

    builds_on: Digest
    """Release of the other cohort."""
    own: Payload
    """P_own, the cohort's own product: what its updates add to. It is never served alone."""
    own_truncation_error: float = Field(ge=0)
    """||M - M_hat||_F / ||M||_F of the merge that made P_own; 0 when nothing was merged."""


class ReleaseManifest(Document):
    """What central says of one candidate or release."""

    schema_version: Literal[1] = 1
    base: Digest
    cohort: str
    version: int = Field(ge=0)
    """Depth in the release tree; 0 is the base itself."""
    parent: Digest | None
    plan: Digest | None
    """Digest of the merge plan that makes exactly this payload; None for version 0."""
    payload: Payload
    rank: int = Field(ge=0)
    truncation_error: float = Field(ge=0)
    """||M - M_hat||_F / ||M||_F of the merge."""
    updates: list[Digest]
    composition: Composition | None = Field(
        default=None, exclude_if=lambda composition: composition is None
    )
    """Only in cohorts that build on another, from version 1 on."""
    created_at: str

    @property
    def label(self) -> str:
        """The version part of alias@version, e.g. v3-7f3a9c01."""
        return f"v{self.version}-{self.digest[:8]}"

    @property
    def own_payload(self) -> Payload:
        """What the cohort's next merge adds to: the served payload or its own part of it."""
        return self.payload if self.composition is None else self.composition.own


class ReceiptBody(Document):
    """Central's word that an update is on disk."""

    schema_version: Literal[1] = 1
    update_id: Digest
    node_id: str
    payload: Digest
    admitted_at: str
    journal_sequence: int = Field(ge=1)
    journal_hash: Digest


def sign(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    """ECDSA P-256/SHA-256 signature of `data` in DER."""
    return key.sign(data, ec.ECDSA(SHA256()))


def verify(public_key_pem: bytes, data: bytes, signature: bytes) -> None:
    """Raises ManifestError unless `signature` is the key's signature of `data`."""
    try:
        _public_key(public_key_pem).verify(signature, data, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise ManifestError(
            "Signature does not fit the document: it was altered or signed with another key."
        ) from None


@lru_cache(maxsize=4096)
def _public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ManifestError(
            f"Verification key is not readable PEM: {error}; expected an ECDSA P-256 public key."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ManifestError(
            f"Verification key is a {type(key).__name__}; expected an ECDSA P-256 key."
        )
    return key
