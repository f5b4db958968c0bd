"""Signed documents: one canonical form, ids over the bytes as sent, signatures that fit exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.manifest import (
    Document,
    ManifestError,
    Payload,
    ReceiptBody,
    ReleaseManifest,
    Start,
    UpdateManifest,
    canonical_json,
    sha256_hex,
    sign,
    verify,
)

DIGESTS = [f"{digit}" * 64 for digit in "0123456789"]


def make_update(**changes: Any) -> UpdateManifest:
    fields: dict[str, Any] = {
        "node_id": "node-a-00c0ffee",
        "sequence": 3,
        "base": DIGESTS[0],
        "start": Start(release=DIGESTS[1], payload=DIGESTS[2], prefix_rank=32, dtype="float32"),
        "rank": 8,
        "payload": Payload(digest_sha256=DIGESTS[3], size_bytes=4096),
        "sections": ["statistics"],
        "round_id": "round-3",
        "experiences": 120,
        "metrics": {"loss": 0.25, "steps": 50.0},
        "created_at": "2026-11-01T10:00:00Z",
        "software": "0.1.0",
    }
    return UpdateManifest(**{**fields, **changes})


def make_release(**changes: Any) -> ReleaseManifest:
    fields: dict[str, Any] = {
        "base": DIGESTS[0],
        "cohort": "shared",
        "version": 3,
        "parent": DIGESTS[1],
        "plan": DIGESTS[2],
        "payload": Payload(digest_sha256=DIGESTS[3], size_bytes=4096),
        "rank": 32,
        "truncation_error": 0.125,
        "updates": [DIGESTS[4]],
        "created_at": "2026-11-01T10:00:00Z",
    }
    return ReleaseManifest(**{**fields, **changes})


def make_receipt() -> ReceiptBody:
    return ReceiptBody(
        update_id=DIGESTS[0],
        node_id="node-a-00c0ffee",
        payload=DIGESTS[1],
        admitted_at="2026-11-01T10:00:00Z",
        journal_sequence=7,
        journal_hash=DIGESTS[2],
    )


def make_pem(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_canonical_json() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é", None]}) == '{"a":[1.5,"é",null],"b":1}'.encode()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json(value)


@pytest.mark.parametrize(
    ("document", "digest"),
    [
        (make_update(), "55fb8be02e7cebdcd3a6daa9b9773b9cfb462ed176b6a98db930297dfc99bcf1"),
        (make_release(), "eea58b8860c2459da748d7e397cae6fe6c254c683aa43976b7fe38f551d290b1"),
        (make_receipt(), "62881fc39a591c7674213bf70d9138be651f61bbba1e4b1487863d32503c0fdd"),
    ],
)
def test_golden_ids(document: Document, digest: str) -> None:
    """An id that changes breaks every journal and every signature there is."""
    assert document.digest == digest
    assert sha256_hex(document.to_bytes()) == digest
    assert type(document).from_bytes(document.to_bytes()) == document


def test_label() -> None:
    release = make_release()
    assert release.label == f"v3-{release.digest[:8]}"


def altered(change: Any) -> bytes:
    fields = json.loads(make_update().to_bytes())
    change(fields)
    return canonical_json(fields)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "UpdateManifest is malformed at document"),
        (b"\xff", "UpdateManifest is malformed at document"),
        (b"[]", "UpdateManifest is malformed at document"),
        (b"[" * 100_000, "UpdateManifest is malformed at document"),
        (altered(lambda f: f.pop("base")), "malformed at base: Field required"),
        (altered(lambda f: f.update(base="A" * 64)), "malformed at base"),
        (altered(lambda f: f.update(cohort="zeta")), "malformed at cohort: Extra inputs"),
        (altered(lambda f: f.update(sequence=0)), "malformed at sequence"),
        (altered(lambda f: f.update(schema_version=2)), "malformed at schema_version"),
        (altered(lambda f: f["start"].update(dtype="int8")), "malformed at start.dtype"),
        (altered(lambda f: f["payload"].update(size_bytes=0)), "malformed at payload.size_bytes"),
        (altered(lambda f: f.update(sequence="3")), "not in canonical form"),
        (altered(lambda f: f["metrics"].update(loss=1)), "not in canonical form"),
        (altered(lambda f: f.pop("supersedes")), "not in canonical form"),
        (
            make_update().to_bytes().replace(b'"loss":0.25', b'"loss":0.250'),
            "not in canonical form",
        ),
        (
            make_update().to_bytes().replace(b'"loss":0.25', b'"loss":NaN'),
            "value without a canonical form",
        ),
        (
            make_update().to_bytes().replace(b'"loss":0.25', b'"loss":1e999'),
            "value without a canonical form",
        ),
        (
            make_update().to_bytes().replace(b'"rank":8', b'"rank":9,"rank":8'),
            "not in canonical form",
        ),
        (make_update().to_bytes() + b"\n", "not in canonical form"),
        (json.dumps(json.loads(make_update().to_bytes())).encode(), "not in canonical form"),
    ],
)
def test_anything_but_the_canonical_document_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        UpdateManifest.from_bytes(data)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_changes_the_id_or_is_refused(position: int, mask: int) -> None:
    good = make_update()
    data = bytearray(good.to_bytes())
    data[position % len(data)] ^= mask
    try:
        document = UpdateManifest.from_bytes(bytes(data))
    except ManifestError:
        return
    assert document.digest != good.digest
    assert document.to_bytes() == bytes(data)


def test_signatures_fit_one_key_and_one_text() -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    data = make_update().to_bytes()
    signature = sign(key, data)
    verify(make_pem(key.public_key()), data, signature)
    for public, text, signed in (
        (key, data + b" ", signature),
        (key, data, sign(other, data)),
        (other, data, signature),
        (key, data, b""),
        (key, data, signature[:-1]),
        (key, data, bytes(len(signature))),
    ):
        with pytest.raises(ManifestError, match="Signature does not fit"):
            verify(make_pem(public.public_key()), text, signed)


@pytest.mark.parametrize(
    ("pem", "said"),
    [
        (b"", "not readable PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not readable PEM"),
        (
            make_pem(ed25519.Ed25519PrivateKey.generate().public_key()),
            "expected an ECDSA P-256 key",
        ),
        (
            make_pem(ec.generate_private_key(ec.SECP384R1()).public_key()),
            "expected an ECDSA P-256 key",
        ),
    ],
)
def test_another_kind_of_key_is_refused(pem: bytes, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        verify(pem, b"text", b"signature")


@pytest.mark.parametrize("field", ["sequence", "experiences"])
def test_numbers_that_no_listing_can_carry_are_refused(field: str) -> None:
    document = json.loads(make_update().to_bytes())
    UpdateManifest.from_bytes(canonical_json({**document, field: 2**63 - 1}))
    with pytest.raises(ManifestError, match=f"malformed at {field}"):
        UpdateManifest.from_bytes(canonical_json({**document, field: 2**63}))
