"""A release that is not served as it is on central's word is put away, and the alias stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.errors import Damaged, NotHeld, NotProved, ServingError
from edge_node.identity import Identity
from edge_node.problems import Problems
from edge_node.proof.distance import MOST_QUANTISED, MOST_ROUNDING, Reference, Served
from edge_node.proof.proof import Proof, make_proof
from edge_node.proof.references import NoReference, NoRoom
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.settings import EdgeSettings, ReleasesSettings, ServingSettings
from protos.base import BaseModelInfo
from tests.fakes.signed_releases import BASE, SHAPES, make_payload, make_signed

NAME, TARGET = "lorikeet@v1-aaaaaaaa", "lorikeet@v0-00000000"
VALUES = np.zeros((2, 4), np.float32)


class Control:
    """Remembers calls. `held`: what its workers hold instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.held = ""
        self.target: str | None = TARGET

    async def load(self, name: str, path: Path, *, proved: bool = True) -> None:
        assert not proved
        self.calls.append(("load", name))

    async def expect_held(self, name: str) -> None:
        self.calls.append(("held", name))
        if self.held:
            raise NotHeld(self.held)

    async def unload(self, name: str) -> None:
        self.calls.append(("unload", name))
        if name == self.target:
            raise ServingError("the alias points at it")

    async def state(self) -> Any:
        return SimpleNamespace(base="base@01234567", target=self.target)

    @asynccontextmanager
    async def requests(self, connections: int) -> AsyncIterator[httpx.AsyncClient]:
        async with httpx.AsyncClient() as client:
            yield client


class Known:
    """References: one that is `apart` from the base, or none."""

    def __init__(self, apart: float = 1.0, why: str = "") -> None:
        self.reference = Reference([[1, 2, 3, 4, 5]] * 2, VALUES + np.float32(apart), VALUES)
        self.why = why
        self.on_disk = True
        self.asked: list[str] = []

    async def of(self, release: StoredRelease, before: StoredRelease | None) -> Reference:
        self.asked.append(release.label)
        if self.why:
            raise (NoRoom if self.why.startswith("a second copy") else NoReference)(self.why)
        return self.reference

    def kept(self, release: StoredRelease) -> Reference | None:
        return self.reference if self.on_disk else None


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    made = ReleaseStore(
        tmp_path,
        Identity("n-1", "shared", BASE, key, b"", b"", public),
        BaseModelInfo(tmp_path, BASE, SHAPES),
    )
    payload = make_payload()
    made.install(make_signed(key, payload), payload)
    return made


@pytest.fixture
def release(store: ReleaseStore) -> StoredRelease:
    return store.newest()[0]


def answering(monkeypatch: pytest.MonkeyPatch, release: Any, base: Any = VALUES) -> list[Any]:
    """What vLLM serves as the release, and as the base; and what was asked."""
    asked: list[Any] = []

    async def ask(
        client: object, reference: object, name: str, base_name: str, before: str | None
    ) -> Served:
        asked.append((name, base_name, before))
        return Served(release, base, None, [{1: -0.5}], [{1: -0.5}])

    monkeypatch.setattr("edge_node.proof.proof.ask_canaries", ask)
    return asked


def make(tmp_path: Path, store: ReleaseStore, control: Control, known: Known | None) -> Proof:
    return Proof(tmp_path, store, control, known, None)  # type: ignore[arg-type]


async def test_a_release_is_loaded_hidden_and_its_weights_are_compared(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease
) -> None:
    control = Control()
    await make(tmp_path, store, control, None).load(NAME, release)
    assert control.calls == [("load", NAME), ("held", NAME)]


async def test_weights_that_are_not_held_put_the_version_away(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease
) -> None:
    control = Control()
    control.held = "2 of 14 modules are not held"
    with pytest.raises(NotProved, match=r"2 of 14 modules.*The node tries it again"):
        await make(tmp_path, store, control, None).load(NAME, release)
    assert control.calls[-1] == ("unload", NAME)
    assert store.newest() == [release], "its directory is whole: it is loaded anew"


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", lambda data: data[:-8]),
        ("adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("adapter_config.json", lambda data: data.replace(b'"lora_alpha": 3', b'"lora_alpha": 9')),
        ("payload.safetensors", lambda data: data[:-8]),
        ("manifest.json", lambda data: data.replace(b'"version":1', b'"version":2')),
    ],
)
async def test_a_damaged_directory_is_never_loaded(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, file: str, damage: Any
) -> None:
    before = (release.path / file).read_bytes()
    assert damage(before) != before
    (release.path / file).write_bytes(damage(before))
    control = Control()
    with pytest.raises(Damaged, match=f"damaged on disk: {file} is not what central signed"):
        await make(tmp_path, store, control, None).load(NAME, release)
    assert ("load", NAME) not in control.calls
    assert release.path.exists(), "without central there is no other one"


async def test_answers_of_the_base_are_no_proof(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, known = Control(), Known()
    proof = make(tmp_path, store, control, known)  # type: ignore[arg-type]
    asked = answering(monkeypatch, VALUES)
    with pytest.raises(NotProved, match="it answers as the base does"):
        await proof.expect(NAME, release, None)
    assert asked == [(NAME, "base@01234567", TARGET)]
    assert control.calls == [("unload", NAME)]
    answering(monkeypatch, known.reference.release)
    await proof.expect(NAME, release, None)
    assert proof.last is not None
    assert proof.last.tells


async def test_a_version_that_the_alias_points_at_stays_loaded(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = Control()
    control.target = NAME
    asked = answering(monkeypatch, VALUES)
    with pytest.raises(NotProved):
        await make(tmp_path, store, control, Known()).expect(NAME, release, None)
    assert asked == [(NAME, "base@01234567", None)], "a version is not compared with itself"


async def test_without_a_reference_the_weights_decide_and_the_node_says_so(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, known = Control(), Known(why="the process ended with -9")
    proof = make(tmp_path, store, control, known)
    asked = answering(monkeypatch, VALUES)
    await proof.expect(NAME, release, None)
    (problem,) = Problems(tmp_path).current()
    assert (problem.room, asked) == ("proof", [])
    assert "by its weights alone, because the process ended" in problem.text
    assert "EDGE_RELEASES__PROOF=checksums" in problem.next_step
    known.why = ""
    answering(monkeypatch, known.reference.release)
    await proof.expect(NAME, release, None)
    assert Problems(tmp_path).current() == []


async def test_a_base_without_room_for_a_copy_is_no_problem(
    tmp_path: Path,
    store: ReleaseStore,
    release: StoredRelease,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    proof = make(tmp_path, store, Control(), Known(why="a second copy of the base needs 19 GiB"))
    asked = answering(monkeypatch, VALUES)
    for _ in range(2):
        await proof.expect(NAME, release, None)
    assert (asked, Problems(tmp_path).current()) == ([], [])
    said = [one for one in caplog.records if one.message.endswith("by their weights alone")]
    assert len(said) == 1


async def test_a_start_waits_for_no_reference_that_is_not_there(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known()
    proof = make(tmp_path, store, Control(), known)
    answering(monkeypatch, VALUES)
    known.on_disk = False
    await proof.expect(NAME, release, None, made=False)
    known.on_disk = True
    with pytest.raises(NotProved):
        await proof.expect(NAME, release, None, made=False)
    assert known.asked == []


async def test_a_reference_is_made_ahead(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease
) -> None:
    known = Known(why="it could not be made")
    proof = make(tmp_path, store, Control(), known)
    for _ in range(3):
        proof.prepare(release, None)
    while not known.asked:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    assert known.asked == [release.label], "a switch would wait for all of them"
    await proof.aclose()


async def test_the_setting_decides_what_is_compared(
    tmp_path: Path, store: ReleaseStore, release: StoredRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    base = BaseModelInfo(tmp_path, BASE, SHAPES)

    def proof(setting: Any, *extra: str) -> Proof | None:
        settings = EdgeSettings(
            data_dir=tmp_path,
            releases=ReleasesSettings(proof=setting),
            serving=ServingSettings(extra_args=list(extra)),
        )
        return make_proof(settings, base, store, Control())  # type: ignore[arg-type]

    assert proof("off") is None
    weights_alone = proof("checksums")
    assert weights_alone is not None
    asked = answering(monkeypatch, VALUES)
    await weights_alone.expect(NAME, release, None)
    weights_alone.prepare(release, None)
    assert asked == []
    both = proof("on")
    assert both is not None
    assert both._most_rounding == MOST_ROUNDING
    await both.aclose()
    quantised = proof("on", "--quantization=fp8")
    assert quantised is not None
    assert quantised._most_rounding == MOST_QUANTISED
    await quantised.aclose()
