"""A reference is made once, kept, and made again when it cannot be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.identity import Identity
from edge_node.proof import references as room
from edge_node.proof.references import NoReference, NoRoom, References
from edge_node.releases.store import ReleaseStore, StoredRelease
from protos.base import BaseModelInfo
from tests.fakes.signed_releases import BASE, SHAPES, make_payload, make_signed

BODY = {
    "prompts": [[1, 2, 3]] * 2,
    "release": [[-1.0, -2.0]] * 2,
    "base": [[-1.5, -2.0]] * 2,
}


class Counting:
    """Answers every order with `body`."""

    def __init__(self, body: Mapping[str, Any] = BODY) -> None:
        self.body = body
        self.orders: list[Mapping[str, Any]] = []

    async def ask(self, order: Mapping[str, Any]) -> Mapping[str, Any]:
        self.orders.append(order)
        return self.body


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    made = ReleaseStore(
        tmp_path,
        Identity("n-1", "shared", BASE, key, b"", b"", public),
        BaseModelInfo(tmp_path, BASE, SHAPES),
    )
    made.key = key  # type: ignore[attr-defined]
    return made


@pytest.fixture
def release(store: ReleaseStore) -> StoredRelease:
    payload = make_payload()
    return store.install(make_signed(store.key, payload), payload)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def a_base_of_a_thousand_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "count_parameters", lambda path: 1000)


def make(tmp_path: Path, reckoner: Counting, base: str = BASE) -> References:
    return References(tmp_path, BaseModelInfo(tmp_path, base, SHAPES), reckoner, 512)


async def test_it_is_made_once_for_each_release_and_base(
    tmp_path: Path, release: StoredRelease
) -> None:
    reckoner = Counting()
    made = await make(tmp_path, reckoner).of(release, None)
    kept = await make(tmp_path, reckoner).of(release, None)  # another start of the node
    assert len(reckoner.orders) == 1
    assert made.prompts == kept.prompts
    assert np.array_equal(made.release, kept.release)
    assert np.array_equal(made.base, kept.base)
    await make(tmp_path, reckoner, base="c" * 64).of(release, None)
    assert len(reckoner.orders) == 2
    assert reckoner.orders[0]["seed"] != reckoner.orders[1]["seed"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("-2.0", "-2.5", 1),
        lambda text: "",
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "of": {}}),
    ],
)
async def test_a_damaged_one_is_made_again(
    tmp_path: Path, release: StoredRelease, damage: Any
) -> None:
    reckoner = Counting()
    references = make(tmp_path, reckoner)
    await references.of(release, None)
    path = tmp_path / "releases" / "proofs" / f"{release.release_id}.json"
    path.write_text(damage(path.read_text()))
    assert references.kept(release) is None
    assert (await references.of(release, None)).prompts == BODY["prompts"]
    assert len(reckoner.orders) == 2
    assert references.kept(release) is not None


async def test_a_directory_of_another_rank_has_another_one(
    tmp_path: Path, release: StoredRelease
) -> None:
    reckoner = Counting()
    references = make(tmp_path, reckoner)
    await references.of(release, None)
    (release.path / "adapter_config.json").write_text('{"r": 1}')
    await references.of(release, None)
    assert len(reckoner.orders) == 2


async def test_a_base_too_large_for_a_second_copy_is_not_loaded(
    tmp_path: Path, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda: 10 << 30)
    monkeypatch.setattr(room, "count_parameters", lambda path: 8_000_000_000)
    reckoner = Counting()
    with pytest.raises(NoRoom, match=r"needs 19\.\d GiB of memory, and 10\.0 GiB are free"):
        await make(tmp_path, reckoner).of(release, None)
    assert reckoner.orders == []


async def test_what_is_not_finite_is_no_reference(tmp_path: Path, release: StoredRelease) -> None:
    bad = {**BODY, "release": [[-1.0, float("nan")]] * 2}
    with pytest.raises(NoReference, match="cannot be used"):
        await make(tmp_path, Counting(bad)).of(release, None)


async def test_a_full_disk_costs_the_file_alone(
    tmp_path: Path, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise room.StorageError("no space")

    monkeypatch.setattr(room, "write_file", full)
    references = make(tmp_path, Counting())
    assert (await references.of(release, None)).prompts == BODY["prompts"]
    assert references.kept(release) is None


async def test_those_of_versions_that_are_gone_are_deleted(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease
) -> None:
    references = make(tmp_path, Counting())
    await references.of(release, None)
    gone = replace(release, release_id="f" * 64)
    (references._folder / f"{gone.release_id}.json").write_text("{}")
    references.sweep()
    assert [path.stem for path in references._folder.iterdir()] == [release.release_id]


def test_the_containers_bound_counts(tmp_path: Path) -> None:
    memory, group = tmp_path / "meminfo", tmp_path / "group"
    memory.write_text("MemTotal: 9 kB\nMemAvailable:   4096 kB\n")
    assert room.free_bytes(memory, group) == 4096 << 10
    group.mkdir()
    for name, text in (
        ("memory.max", "3000000\n"),
        ("memory.current", "2500000\n"),
        ("memory.stat", "anon 1\ninactive_file 500000\n"),
    ):
        (group / name).write_text(text)
    assert room.free_bytes(memory, group) == 1_000_000
    (group / "memory.max").write_text("max\n")
    assert room.free_bytes(memory, group) == 4096 << 10
    assert room.free_bytes(tmp_path / "none", group) == 0
