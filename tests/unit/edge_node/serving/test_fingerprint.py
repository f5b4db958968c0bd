"""The digest that names the weights of an answer."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from edge_node.errors import ServingError
from edge_node.serving.fingerprint import weights_digest
from protos.manifest import sha256_hex
from tests.fakes.signed_releases import make_payload, make_signed


def make_release(folder: Path, served_rank: int) -> str:
    payload = make_payload()
    signed = make_signed(ec.generate_private_key(ec.SECP256R1()), payload)  # of rank 3
    (folder / "manifest.json").write_bytes(signed.manifest)
    (folder / "adapter_config.json").write_text(f'{{"r": {served_rank}}}')
    return sha256_hex(payload)


def test_a_release_has_the_digest_that_central_signed(tmp_path: Path) -> None:
    digest = make_release(tmp_path, 3)
    assert weights_digest(tmp_path) == digest


def test_the_first_pairs_of_a_release_are_said_to_be(tmp_path: Path) -> None:
    digest = make_release(tmp_path, 2)
    assert weights_digest(tmp_path) == f"{digest}/r2"


def test_another_adapter_has_the_digest_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"factors")
    assert weights_digest(tmp_path) == hashlib.sha256(b"factors").hexdigest()


@pytest.mark.parametrize("manifest", [None, b"{", b"[]"])
def test_what_cannot_be_read_is_named(tmp_path: Path, manifest: bytes | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    with pytest.raises(ServingError, match="have no digest"):
        weights_digest(tmp_path)
