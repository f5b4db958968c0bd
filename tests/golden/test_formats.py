"""Today's code reads what released versions wrote, and writes the same bytes again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from central.backup.restore import check_backup, open_backup, restore
from central.blobs import DirectoryBlobs
from central.journal import verify_journal
from central.journal.payloads import stored_blobs
from central.settings import CentralSettings
from edge_node.experience import ExperienceStore
from edge_node.identity import Identity
from edge_node.outbox import Outbox, OutboxState
from edge_node.releases.store import ReleaseStore
from protos.base import BaseModelInfo
from protos.encoding import ENCODINGS
from protos.lora import decode, encode
from protos.manifest import ManifestError, ReleaseManifest, UpdateManifest, sha256_hex, verify
from tests.golden.record_formats import BASE, INTERACTION, SHAPES, silent

VERSIONS = sorted(path for path in Path(__file__).parent.glob("[0-9]*") if path.is_dir())


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def version(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of one version's folder: opening a store may write to it."""
    shutil.copytree(request.param, tmp_path / "golden")
    return tmp_path / "golden"


def test_payloads_are_encoded_to_the_same_bytes(version: Path) -> None:
    files = sorted((version / "wire").glob("*.safetensors"))
    assert files
    for file in files:
        data = file.read_bytes()
        tensors = decode(data)
        assert f"rank{tensors.rank}.safetensors" == file.name
        assert encode(tensors) == data


def test_an_encoding_has_the_same_bytes_and_is_read_as_the_same_numbers(version: Path) -> None:
    exact = decode((version / "encodings" / "float32.safetensors").read_bytes())
    for encoding in ENCODINGS:
        data = (version / "encodings" / f"{encoding}.safetensors").read_bytes()
        assert encode(exact, encoding) == data
        said = (version / "encodings" / f"{encoding}.sha256").read_text().strip()
        assert sha256_hex(encode(decode(data))) == said


@pytest.mark.parametrize(
    ("name", "kind"), [("update", UpdateManifest), ("release", ReleaseManifest)]
)
def test_manifests_keep_bytes_digest_and_signature(
    version: Path, name: str, kind: type[UpdateManifest] | type[ReleaseManifest]
) -> None:
    wire = version / "wire"
    data = (wire / f"{name}.json").read_bytes()
    document = kind.from_bytes(data)
    assert document.to_bytes() == data
    assert document.digest == sha256_hex(data) == (wire / f"{name}.sha256").read_text().strip()
    signer, signature = (wire / "signer.pub.pem").read_bytes(), (wire / f"{name}.sig").read_bytes()
    verify(signer, data, signature)
    with pytest.raises(ManifestError):
        verify(signer, data + b" ", signature)


def test_a_node_reads_its_releases(version: Path) -> None:
    signer = (version / "wire" / "signer.pub.pem").read_bytes()
    key = ec.generate_private_key(ec.SECP256R1())
    node = Identity("node-a-00c0ffee", "shared", BASE, key, b"", b"", signer)
    store = ReleaseStore(version / "node", node, BaseModelInfo(version, BASE, SHAPES))
    (release,) = store.newest()
    assert release.manifest.to_bytes() == (version / "wire" / "release.json").read_bytes()
    assert store.quarantine() == "odd labels"


def test_a_node_reads_its_outbox_and_goes_on_with_it(version: Path) -> None:
    outbox = Outbox(version / "node" / "outbox", "manual")
    (entry,) = outbox.list()
    assert (entry.sequence, entry.state) == (1, OutboxState.HELD)
    manifest, signature = outbox.signed(entry.update_id)
    verify((version / "wire" / "signer.pub.pem").read_bytes(), manifest, signature)
    payload = outbox.payload_path(entry.round_id).read_bytes()
    assert UpdateManifest.from_bytes(manifest).payload.digest_sha256 == sha256_hex(payload)
    assert outbox.next_sequence() == 2


def test_a_node_reads_its_experience(version: Path) -> None:
    store = ExperienceStore(version / "node" / "experience.db")
    assert store.interaction(INTERACTION.id) == INTERACTION
    assert store.counts().examples == 1
    assert store.cursor() == 1


def test_a_backup_is_restored(version: Path, tmp_path: Path) -> None:
    source = open_backup(version / "backup", None)
    check_backup(source, silent)
    settings = CentralSettings(data_dir=tmp_path / "central")
    restore(settings, source, silent)
    state = verify_journal(settings.journal_url)
    assert state.last_hash == source.manifest.last_hash
    assert max(release.manifest.version for release in state.releases.values()) == 1
    blobs = DirectoryBlobs(settings.data_dir / "blobs")
    for digest in stored_blobs(state):
        blobs.read(digest)
