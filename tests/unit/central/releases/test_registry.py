"""The registry: lineage, channels, rollback, names."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.blobs import DirectoryBlobs
from central.errors import Refused
from central.fleet.pki import public_pem
from central.journal import Journal, JournalConflict, ReleaseRecord
from central.releases import Registry
from protos.lora import LoraTensors, encode
from protos.manifest import ReleaseManifest, verify
from tests.unit.central import builders as make

KEY = ec.generate_private_key(ec.SECP256R1())


class World:
    def __init__(self, path: Path) -> None:
        self.journal = Journal(f"sqlite:///{path}/journal.db")
        self.blobs = DirectoryBlobs(path / "blobs")
        self.registry = Registry(self.journal, self.blobs, KEY, make.BASE)
        self.genesis = self.registry.ensure_cohort("shared")
        self.journal.append(make.token_created(), make.node_enrolled())

    def candidate(self, parent: ReleaseRecord, sequence: int) -> ReleaseManifest:
        update = make.make_update(self.genesis.manifest, sequence=sequence)
        plan = make.make_plan(parent.manifest, update)
        self.journal.append(make.admitted(update), make.planned(plan))
        return self.registry.add_candidate(plan.digest, encode(LoraTensors()), 0.1)

    def release(
        self, parent: ReleaseRecord, sequence: int, channel: str = "stable"
    ) -> ReleaseRecord:
        manifest = self.candidate(parent, sequence)
        self.journal.append(make.decided(manifest, True))
        return self.registry.promote(manifest.digest, channel, "tests")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_version_0_is_the_base_signed_and_made_once(world: World) -> None:
    again = world.registry.ensure_cohort("shared")
    assert again == world.genesis
    assert world.blobs.read(again.manifest.payload.digest_sha256) == encode(LoraTensors())
    verify(public_pem(KEY.public_key()), again.manifest_bytes, again.signature)
    assert world.registry.ensure_cohort("zeta").release_id != again.release_id


@pytest.mark.parametrize("name", ["", "A", "a/b", "a b", "x" * 64, "-a"])
def test_a_bad_cohort_name_is_refused(world: World, name: str) -> None:
    with pytest.raises(Refused, match="is not a name"):
        world.registry.ensure_cohort(name)


def test_a_candidate_is_made_once_and_takes_its_time_from_the_plan(world: World) -> None:
    manifest = world.candidate(world.genesis, 1)
    assert manifest.plan is not None
    assert world.registry.add_candidate(manifest.plan, encode(LoraTensors()), 0.9) == manifest
    assert (manifest.created_at, manifest.version, manifest.parent) == (
        make.AT,
        1,
        world.genesis.release_id,
    )


def test_rollback_abandons_the_line_and_its_branches(world: World) -> None:
    first = world.release(world.genesis, 1)
    second = world.release(first, 2)
    branch_manifest = world.candidate(first, 3)  # as older software could promote it
    world.journal.append(
        make.decided(branch_manifest, True), make.promoted(branch_manifest, "canary")
    )
    branch = world.registry.resolve(branch_manifest.digest)
    pending = world.candidate(second, 4)
    done = world.registry.rollback("shared", world.genesis.release_id, "requeue", "tests")
    assert done.abandoned == (first.release_id, second.release_id, branch.release_id)
    with world.journal.read() as state:
        assert state.channels == {("shared", "stable"): world.genesis.release_id}
        assert [update.manifest.sequence for update in state.waiting("shared")] == [1, 2, 3, 4]
    with pytest.raises(JournalConflict):
        world.journal.append(make.decided(pending, True))
    with pytest.raises(Refused, match="not an ancestor"):
        world.registry.rollback("shared", None, "requeue", "tests")
    with pytest.raises(Refused, match="abandoned"):
        world.registry.promote(first.release_id, "stable", "tests")


def test_rollback_without_a_target_goes_one_back(world: World) -> None:
    first = world.release(world.genesis, 1)
    second = world.release(first, 2)
    done = world.registry.rollback("shared", None, "set_aside", "tests")
    assert (done.release.release_id, done.abandoned) == (first.release_id, (second.release_id,))


def test_stable_never_goes_back_by_promotion(world: World) -> None:
    first = world.release(world.genesis, 1)
    with pytest.raises(Refused, match="rollback"):
        world.registry.promote(world.genesis.release_id, "stable", "tests")
    before = world.journal.verify()
    world.registry.promote(first.release_id, "stable", "tests")
    assert world.journal.verify() == before


def test_a_release_is_found_by_id_prefix_and_version(world: World) -> None:
    release_id, label = world.genesis.release_id, world.genesis.manifest.label
    for text in (release_id, release_id[:6], label):
        assert world.registry.resolve(text) == world.genesis
    for text in (release_id[:5], "", "v1", "f" * 64):
        with pytest.raises(Refused, match="is not known"):
            world.registry.resolve(text)
    with pytest.raises(Refused, match=f"is not one of cohort 'zeta': it fits {label} of shared"):
        world.registry.resolve(label, "zeta")


def test_a_prefix_of_two_releases_names_both(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("central.releases.registry.MIN_PREFIX_DIGITS", 0)
    first = world.release(world.genesis, 1)
    with pytest.raises(
        Refused,
        match=f"fits 2 releases: {world.genesis.manifest.label} of shared, {first.manifest.label}",
    ):
        world.registry.resolve("")
