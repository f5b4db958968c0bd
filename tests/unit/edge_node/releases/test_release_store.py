"""Release store: only what central signed for this base and cohort gets in, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.numpy import load_file

from edge_node.errors import AdapterError, StorageError
from edge_node.identity import Identity
from edge_node.releases.store import ReleaseStore
from protos.base import BaseModelInfo
from protos.lora import LoraModule, LoraTensors, encode
from protos.manifest import Payload, ReleaseManifest, sha256_hex, sign
from protos.releases.v1 import releases_pb2

BASE = "b" * 64
SHAPES = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.0.mlp.up_proj": (8, 4)}


@pytest.fixture(scope="module")
def release_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def store(tmp_path: Path, release_key: ec.EllipticCurvePrivateKey) -> ReleaseStore:
    public = release_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    identity = Identity("n-1", "shared", BASE, release_key, b"", b"", public)
    return ReleaseStore(tmp_path, identity, BaseModelInfo(tmp_path, BASE, SHAPES))


def make_payload(rank: int = 2) -> bytes:
    rng = np.random.default_rng(0)
    modules = {
        name: LoraModule(
            rng.normal(size=(rank + i, shape[1])).astype(np.float32),
            rng.normal(size=(shape[0], rank + i)).astype(np.float32),
            scale=0.5,
        )
        for i, (name, shape) in enumerate(sorted(SHAPES.items()))
    }
    return encode(LoraTensors(modules))


def make_signed(key: ec.EllipticCurvePrivateKey, payload: bytes, **changes: object) -> releases_pb2.SignedManifest:
    fields: dict[str, object] = {
        "base": BASE,
        "cohort": "shared",
        "version": 1,
        "parent": "a" * 64,
        "plan": "c" * 64,
        "payload": Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        "rank": 3,
        "truncation_error": 0.0,
        "updates": [],
        "created_at": "2026-01-01T00:00:00Z",
    }
    data = ReleaseManifest.model_validate(fields | changes).to_bytes()
    return releases_pb2.SignedManifest(manifest=data, signature=sign(key, data))


def test_installed_directory_is_the_same_increment(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    payload = make_payload()
    release = store.install(make_signed(release_key, payload), payload)
    tensors = load_file(release.path / "adapter_model.safetensors")
    from protos.lora import decode

    for name, module in decode(payload).modules.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert a.shape[0] == 3, "every module is padded to the largest rank"
        np.testing.assert_allclose(b @ a, module.scale * module.B @ module.A, rtol=1e-5, atol=1e-6)
    assert store.install(make_signed(release_key, payload), payload).path == release.path


def test_a_release_without_modules_changes_nothing(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    payload = encode(LoraTensors())
    release = store.install(make_signed(release_key, payload, version=0, parent=None, plan=None, rank=0), payload)
    tensors = load_file(release.path / "adapter_model.safetensors")
    assert len(tensors) == 2
    assert all(not tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"cohort": "zeta"}, "cohort 'zeta'"), ({"base": "d" * 64}, "base dddddddd")],
)
def test_other_cohort_or_base_is_refused(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey, changes: dict[str, str], words: str
) -> None:
    payload = make_payload()
    with pytest.raises(AdapterError, match=words):
        store.install(make_signed(release_key, payload, **changes), payload)
    assert store.newest() == []


def test_other_signature_is_refused(store: ReleaseStore) -> None:
    payload = make_payload()
    with pytest.raises(AdapterError, match="Signature does not fit"):
        store.install(make_signed(ec.generate_private_key(ec.SECP256R1()), payload), payload)


def test_other_bytes_are_refused(store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey) -> None:
    signed = make_signed(release_key, make_payload())
    with pytest.raises(AdapterError, match="has digest"):
        store.install(signed, make_payload(rank=3))
    assert store.newest() == []


def test_module_that_the_base_lacks_is_refused(store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey) -> None:
    ones = np.ones((2, 4), np.float32)
    payload = encode(LoraTensors({"model.layers.9.q_proj": LoraModule(ones, np.ones((6, 2), np.float32))}))
    with pytest.raises(AdapterError, match="another base"):
        store.install(make_signed(release_key, payload), payload)


def test_active_survives_a_new_store(store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey) -> None:
    assert store.active() is None
    payload = make_payload()
    release = store.install(make_signed(release_key, payload), payload)
    store.activate(release)
    again = ReleaseStore(release.path.parents[2], store._identity, store._base)
    assert again.active() == release
    again.remove(release)
    assert again.active() is None


def test_a_second_handle_leaves_alone_what_is_being_installed(store: ReleaseStore) -> None:
    """`edge-node status` and `doctor` open the store of a running node."""
    half = store.partial("x").with_name("x.directory")
    half.mkdir()
    again = ReleaseStore(half.parents[2], store._identity, store._base)
    assert half.is_dir()
    again.clear_leftovers()
    assert not half.exists()


def test_a_damaged_directory_is_installed_again(store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey) -> None:
    payload = make_payload()
    signed = make_signed(release_key, payload)
    release = store.install(signed, payload)
    (release.path / "manifest.json").write_text("{}")
    assert store.get(release.release_id) is None
    assert store.newest() == []
    assert store.install(signed, payload) == release
    assert store.get(release.release_id) == release


@pytest.mark.parametrize("content", ["garbage", "[]", "{}", "3", ""])
def test_a_damaged_active_release_is_named_and_can_be_replaced(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey, content: str
) -> None:
    payload = make_payload()
    release = store.install(make_signed(release_key, payload), payload)
    (release.path.parents[1] / "active.json").write_text(content)
    with pytest.raises(StorageError, match=r"active\.json cannot be read"):
        store.active()
    store.activate(release)
    assert store.active() == release
