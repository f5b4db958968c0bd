"""A release that ends vLLM soon after its switch is left, and stays away until another is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from edge_node.errors import StorageError
from edge_node.identity import Identity
from edge_node.problems import Problems
from edge_node.releases.probation import Probation, avoided_releases
from edge_node.releases.store import ReleaseStore, StoredRelease
from edge_node.serving.loading import forget_loading, note_loading
from edge_node.settings import EdgeSettings
from protos.base import BaseModelInfo
from tests.fakes.signed_releases import BASE, SHAPES, make_payload, make_signed


@dataclass
class Story:
    settings: EdgeSettings
    store: ReleaseStore
    releases: list[StoredRelease]
    now: float = 0.0
    probation: Probation = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.probation = Probation(self.settings, self.store, clock=lambda: self.now)

    def switch(self, number: int) -> None:
        self.probation.named([self.releases[number].release_id])
        self.probation.switching(self.releases[number])
        self.store.activate(self.releases[number])

    def serve(self, number: int, seconds: float) -> None:
        self.probation.serves(self.releases[number].release_id)
        self.now += seconds
        self.probation.serves(self.releases[number].release_id)

    def crash(self, *, served: bool = True) -> bool:
        return self.probation.ended("killed by SIGKILL", served=served)

    @property
    def active(self) -> int:
        active = self.store.active()
        assert active is not None
        return self.releases.index(active)

    def avoided(self, number: int) -> str | None:
        return self.probation.why_avoided(self.releases[number].release_id)


@pytest.fixture
def story(tmp_path: Path) -> Story:
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    identity = Identity("n-1", "shared", BASE, key, b"", b"", public)
    store = ReleaseStore(tmp_path, identity, BaseModelInfo(tmp_path, BASE, SHAPES))
    payload = make_payload()
    releases = [
        store.install(make_signed(key, payload, version=version), payload) for version in range(4)
    ]
    store.activate(releases[0])
    return Story(EdgeSettings(data_dir=tmp_path), store, releases)


def test_three_crashes_go_back_to_the_last_good_release(story: Story) -> None:
    story.switch(1)
    assert [story.crash(), story.crash(), story.active] == [True, True, 1]
    assert story.crash()
    assert story.active == 0
    why = story.avoided(1)
    label = story.releases[1].label
    assert why is not None
    assert why.startswith(f"vLLM ended 3 times soon after it got release {label}")
    assert f"serves {story.releases[0].label} again" in why
    assert avoided_releases(story.settings.data_dir) == {label: why}
    [problem] = Problems(story.settings.data_dir).current()
    assert (problem.room, problem.text) == ("releases", why)
    assert not story.crash(), "the good one is not on probation"


def test_restarts_of_the_node_do_not_begin_anew(story: Story) -> None:
    story.switch(1)
    for _ in range(3):
        story.restart()
        story.crash()
    story.restart()
    assert (story.active, story.avoided(1) is not None) == (0, True)


def test_a_release_that_has_proved_itself_is_kept_whatever_happens(story: Story) -> None:
    story.switch(1)
    story.crash()
    story.serve(1, 599)
    assert story.probation.needed == {story.releases[0].release_id, story.releases[1].release_id}
    story.serve(1, 1)
    assert [story.crash() for _ in range(5)] == [False] * 5
    assert (story.active, story.avoided(1)) == (1, None)
    assert story.probation.needed == {story.releases[1].release_id}


def test_each_vllm_begins_the_probation_anew(story: Story) -> None:
    story.switch(1)
    for _ in range(3):
        story.serve(1, 400)
        story.crash()
    assert story.active == 0


def test_the_way_back_passes_over_what_never_proved_itself(story: Story) -> None:
    story.switch(1)
    story.switch(2)
    for _ in range(3):
        story.crash()
    assert story.active == 0


def test_the_way_back_is_remembered_though_it_did_not_wait_for_the_disk(story: Story) -> None:
    story.switch(1)
    story.switch(0)
    story.serve(0, 1)
    story.restart()
    assert story.probation.needed == {story.releases[0].release_id}
    assert not story.crash()


def test_another_head_ends_it(story: Story) -> None:
    story.switch(1)
    for _ in range(3):
        story.crash()
    ids = [release.release_id for release in story.releases]
    story.probation.named([ids[1]])
    assert story.avoided(1)
    story.probation.named([ids[0]])
    assert story.avoided(1) is None
    story.switch(1)
    assert (story.crash(), story.active) == (True, 1), "three more"


def test_one_that_ends_vllm_while_it_is_loaded_counts(story: Story) -> None:
    """A candidate, or a head that was never served: the active one is innocent."""
    name = f"lorikeet@{story.releases[2].label}"
    for _ in range(3):
        note_loading(story.settings.data_dir, name)
        assert story.crash(served=False)
    assert story.active == 0
    why = story.avoided(2)
    assert why is not None
    assert "again" not in why
    forget_loading(story.settings.data_dir)


def test_a_vllm_that_ends_before_it_loads_anything_blames_nobody(story: Story) -> None:
    story.switch(1)
    assert [story.crash(served=False) for _ in range(5)] == [False] * 5
    assert story.active == 1


def test_without_an_earlier_release_there_is_no_way_back(story: Story) -> None:
    (story.settings.data_dir / "releases" / "active.json").unlink()
    story.switch(1)
    assert [story.crash() for _ in range(3)] == [True, True, False]
    assert (story.active, story.avoided(1)) == (1, None)
    [problem] = Problems(story.settings.data_dir).current()
    assert "no earlier release is here" in problem.text


@pytest.mark.parametrize("damage", [b"", b"{", b'{"crashes": 7}', b"[]", b"\xff"])
def test_a_damaged_file_is_forgotten(story: Story, damage: bytes) -> None:
    story.switch(1)
    (story.settings.data_dir / "releases" / "probation.json").write_bytes(damage)
    story.restart()
    assert not story.crash()
    assert story.probation.needed == set()
    story.switch(2)
    assert story.probation.needed == {one.release_id for one in story.releases[1:3]}


def test_a_full_disk_costs_the_memory_alone(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    story.switch(1)

    def full(*_: object) -> None:
        raise StorageError("Cannot write: no space.")

    monkeypatch.setattr("edge_node.releases.probation.write_file", full)
    assert [story.crash() for _ in range(3)] == [True] * 3
    assert (story.active, story.avoided(1) is not None) == (0, True)
    with pytest.raises(StorageError):
        story.switch(2)
