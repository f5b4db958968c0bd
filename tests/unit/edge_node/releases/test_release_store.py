"""Release store: only what central signed for this base and cohort gets in, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from safetensors.numpy import load_file

from edge_node.errors import AdapterError, StorageError
from edge_node.identity import Identity
from edge_node.releases.peft_directory import directory_rank
from edge_node.releases.store import ReleaseStore, StoredRelease
from protos.base import BaseModelInfo
from protos.lora import LoraModule, LoraTensors, decode, encode
from tests.fakes.signed_releases import BASE, SHAPES, make_payload, make_signed


@pytest.fixture(scope="module")
def release_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def store(tmp_path: Path, release_key: ec.EllipticCurvePrivateKey) -> ReleaseStore:
    public = release_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    identity = Identity("n-1", "shared", BASE, release_key, b"", b"", public)
    return ReleaseStore(tmp_path, identity, BaseModelInfo(tmp_path, BASE, SHAPES))


def test_what_central_said_of_a_quarantine_is_kept_and_a_damaged_file_is_written_anew(
    store: ReleaseStore, tmp_path: Path
) -> None:
    assert store.quarantine() == ""
    store.keep_standing("odd labels")
    assert store.quarantine() == "odd labels"
    for damage in ("", "[]", "{}"):
        (tmp_path / "releases" / "standing.json").write_text(damage)
        with pytest.raises(StorageError, match=r"standing\.json cannot be read"):
            store.quarantine()
        store.keep_standing("")
        assert store.quarantine() == ""


def test_installed_directory_is_the_same_increment(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    payload = make_payload()
    release = store.install(make_signed(release_key, payload), payload)
    tensors = load_file(release.path / "adapter_model.safetensors")
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
    release = store.install(
        make_signed(release_key, payload, version=0, parent=None, plan=None, rank=0), payload
    )
    tensors = load_file(release.path / "adapter_model.safetensors")
    assert len(tensors) == 2
    assert all(not tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"cohort": "zeta"}, "cohort 'zeta'"), ({"base": "d" * 64}, "base dddddddd")],
)
def test_other_cohort_or_base_is_refused(
    store: ReleaseStore,
    release_key: ec.EllipticCurvePrivateKey,
    changes: dict[str, str],
    words: str,
) -> None:
    payload = make_payload()
    with pytest.raises(AdapterError, match=words):
        store.install(make_signed(release_key, payload, **changes), payload)
    assert store.newest() == []


def test_a_version_that_is_removed_while_they_are_listed_is_left_out(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = make_payload()
    gone, stays = (
        store.install(make_signed(release_key, payload, version=number), payload)
        for number in (1, 2)
    )
    listed = list((store._root / "versions").iterdir())
    store.remove(gone)
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    assert store.newest() == [stays]


def test_other_signature_is_refused(store: ReleaseStore) -> None:
    payload = make_payload()
    with pytest.raises(AdapterError, match="Signature does not fit"):
        store.install(make_signed(ec.generate_private_key(ec.SECP256R1()), payload), payload)


def test_other_bytes_are_refused(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    signed = make_signed(release_key, make_payload())
    with pytest.raises(AdapterError, match="has digest"):
        store.install(signed, make_payload(rank=3))
    assert store.newest() == []


def test_module_that_the_base_lacks_is_refused(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    ones = np.ones((2, 4), np.float32)
    payload = encode(
        LoraTensors({"model.layers.9.q_proj": LoraModule(ones, np.ones((6, 2), np.float32))})
    )
    with pytest.raises(AdapterError, match="another base"):
        store.install(make_signed(release_key, payload), payload)


def test_active_survives_a_new_store(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
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


def test_a_damaged_directory_is_installed_again(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
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


def make_release(rank: int) -> LoraTensors:
    """Singular pairs in order, as a merge makes them."""
    rng = np.random.default_rng(1)
    modules = {}
    for name, (out_features, in_features) in SHAPES.items():
        u, s, vt = np.linalg.svd(rng.normal(size=(out_features, in_features)), full_matrices=False)
        root = np.sqrt(s[:rank])
        modules[name] = LoraModule(
            np.ascontiguousarray((root[:, None] * vt[:rank]).astype(np.float32)),
            np.ascontiguousarray((u[:, :rank] * root).astype(np.float32)),
        )
    return LoraTensors(modules)


def limited(store: ReleaseStore, max_rank: int | None) -> ReleaseStore:
    return ReleaseStore(store._root.parent, store._identity, store._base, max_rank)


def served_rank(release: StoredRelease) -> int:
    tensors = load_file(release.path / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    assert ranks == {directory_rank(release.path)}
    return ranks.pop()


def test_a_node_with_less_room_serves_a_prefix_of_the_signed_release(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    whole = make_release(4)
    payload = encode(whole)
    signed = make_signed(release_key, payload, rank=4)
    release = limited(store, 2).install(signed, payload)
    assert served_rank(release) == 2
    assert (release.path / "payload.safetensors").read_bytes() == payload, (
        "what was signed stays whole"
    )
    tensors = load_file(release.path / "adapter_model.safetensors")
    for name, module in whole.modules.items():
        product = (
            tensors[f"base_model.model.{name}.lora_B.weight"]
            @ tensors[f"base_model.model.{name}.lora_A.weight"]
        )
        u, s, vt = np.linalg.svd(module.B @ module.A)
        np.testing.assert_allclose(product, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    assert (
        limited(store, 9)
        .install(make_signed(release_key, payload, rank=4, version=2), payload)
        .path
        != release.path
    )
    small = encode(make_release(1))
    assert (
        served_rank(
            limited(store, 2).install(make_signed(release_key, small, rank=1, version=3), small)
        )
        == 1
    )


@pytest.mark.parametrize(("before", "after", "rank"), [(2, None, 4), (None, 2, 2), (3, 1, 1)])
def test_another_rank_is_fitted_at_the_next_start_without_central(
    before: int | None,
    after: int | None,
    rank: int,
    store: ReleaseStore,
    release_key: ec.EllipticCurvePrivateKey,
) -> None:
    payload, empty = encode(make_release(4)), encode(LoraTensors())
    old = limited(store, before)
    release = old.install(make_signed(release_key, payload, rank=4), payload)
    genesis = old.install(
        make_signed(release_key, empty, version=0, parent=None, plan=None, rank=0), empty
    )
    old.activate(release)
    (release.path.parent / "unfinished").mkdir()
    new = limited(store, after)
    assert new.active() is None, "vLLM may not read it at the old rank"
    new.fit_ranks()
    assert new.active() == release
    assert served_rank(release) == rank
    assert new.get(genesis.release_id) is not None
    inode = (release.path / "manifest.json").stat().st_ino
    new.fit_ranks()
    assert (release.path / "manifest.json").stat().st_ino == inode, "what fits is not touched"


def test_a_payload_of_another_rank_than_its_manifest_says_or_that_has_no_prefixes_is_refused(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey
) -> None:
    payload = encode(make_release(4))
    with pytest.raises(AdapterError, match="has rank 4; its manifest says 3"):
        store.install(make_signed(release_key, payload, rank=3), payload)
    update = make_payload()
    with pytest.raises(AdapterError, match="not in the form of a release"):
        limited(store, 1).install(make_signed(release_key, update), update)
    assert store.newest() == []


@pytest.mark.parametrize("encoding", ["bf16", "int8"])
def test_a_rounded_release_is_served_as_the_numbers_that_it_was_rounded_to(
    store: ReleaseStore, release_key: ec.EllipticCurvePrivateKey, encoding: Literal["bf16", "int8"]
) -> None:
    payload = encode(decode(make_payload()), encoding)
    release = store.install(make_signed(release_key, payload), payload)
    tensors = load_file(release.path / "adapter_model.safetensors")
    exact = encode(decode(payload))
    other = store.install(make_signed(release_key, exact), exact)
    served = load_file(other.path / "adapter_model.safetensors")
    assert tensors.keys() == served.keys()
    assert all((tensors[name] == served[name]).all() for name in tensors)
