"""Signatures and keys of a journal: damage is named, a lost or swapped key never replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from central.blobs import DirectoryBlobs
from central.errors import StorageError
from central.fleet.pki import Pki
from central.heads import FILE, NOTE, Heads
from central.journal import EventKind, Journal, NewEvent
from tests.contract.central_harness import Run
from tests.contract.lost.befalls import (
    EVENTS,
    Prepared,
    assert_matches,
    events_of,
    remove_database,
    start,
)


@pytest.mark.parametrize("kind", [EventKind.UPDATE_ADMITTED, EventKind.COHORT_CREATED])
def test_a_signature_that_central_never_checked_is_found(
    data: Path, run: Run, kind: EventKind
) -> None:
    """Events sealed by central's own key, as faulty software would seal them.

    `journal verify` checks what nodes and central signed.
    """
    events = events_of(data)
    number = next(number for number, event in enumerate(events) if event.kind is kind)
    events[number] = NewEvent(
        kind,
        events[number].cohort,
        events[number].subject,
        {**events[number].body, "signature": "bm9uc2Vuc2U="},
    )
    remove_database(data)
    heads = Heads(data, DirectoryBlobs(data / "blobs"), Pki.load_or_create(data, []).release_key)
    journal = Journal(f"sqlite:///{data}/journal.db", seals=heads)
    for event in events:
        journal.append(event)
    heads.start(journal)
    journal.close()
    code, text = run(data, "journal", "verify")
    assert code == 5
    assert_matches(
        rf"Journal event {number + 1} \({kind} of .* holds a signature that does not fit", text
    )


@pytest.mark.parametrize("place", [FILE, f"blobs/{NOTE}"])
def test_a_damaged_head_is_named_and_can_be_removed(
    original: Prepared, data: Path, run: Run, place: str
) -> None:
    good = (data / place).read_bytes()
    for bad, text in (
        (b"\0" * 512, "is damaged"),
        (good.replace(b'"sequence":10', b'"sequence":11'), "is not signed"),
    ):
        (data / place).write_bytes(bad)
        for command in (["journal", "verify"], ["releases", "verify"]):
            code, said = run(data, *command)
            assert (code, text in said, str(data / place) in said) == (5, True, True), said
        with pytest.raises(StorageError, match=text):
            start(original, data)
    (data / place).unlink()
    assert start(original, data) == EVENTS
    assert (data / place).read_bytes() == good


def write_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.mark.parametrize("key", ["ca.key", "release.key"])
def test_a_lost_key_is_never_made_anew(original: Prepared, data: Path, run: Run, key: str) -> None:
    pki = data / "pki"
    kept = (pki / key).read_bytes()
    public = {"ca.key": "ca.pem", "release.key": "release.pub.pem"}[key]
    (pki / key).unlink()
    with pytest.raises(
        StorageError, match=rf"{key} is lost, and nodes trust no other.*Copy it there from a backup"
    ):
        start(original, data)
    (pki / public).unlink()
    with pytest.raises(StorageError, match=rf"{key} is lost"):
        start(original, data)
    assert not (pki / key).exists()
    (pki / key).write_bytes(b"")
    with pytest.raises(StorageError, match=rf"{key} is not a private key"):
        start(original, data)
    (pki / key).write_bytes(kept)
    assert start(original, data) == EVENTS, "the public part is made of it again"


@pytest.mark.parametrize(
    ("key", "public"), [("ca.key", "ca.pem"), ("release.key", "release.pub.pem")]
)
def test_another_key_in_its_place_is_refused(
    original: Prepared, data: Path, key: str, public: str
) -> None:
    write_key(data / "pki" / key)
    with pytest.raises(StorageError, match=rf"{key} is not the key of .*{public}"):
        start(original, data)
    (data / "pki" / public).unlink()
    with pytest.raises(
        StorageError, match=r"not signed by this central's release\.key|those of another central"
    ):
        start(original, data)
    assert not (data / "pki" / public).exists(), "the lost file's place stays free"


def test_without_any_key_a_central_with_a_history_does_not_start(
    original: Prepared, data: Path
) -> None:
    shutil.rmtree(data / "pki")
    with pytest.raises(StorageError, match=r"ca\.key is lost"):
        start(original, data)
    assert list((data / "pki").glob("*")) == []


def test_keys_that_nobody_relies_on_are_made_anew(original: Prepared, data: Path) -> None:
    for name in ("server.key", "server.pem", "operator.key", "operator.pem"):
        (data / "pki" / name).unlink()
    assert start(original, data) == EVENTS


def test_the_release_key_is_a_p256_key(tmp_path: Path) -> None:
    Pki.load_or_create(tmp_path, [])
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "pki" / "release.key").write_bytes(pem)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "pki" / "release.pub.pem").write_bytes(public)
    with pytest.raises(StorageError, match="expected an ECDSA P-256 key"):
        Pki.load_or_create(tmp_path, [])
