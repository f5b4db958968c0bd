"""Restores a central from a backup, and checks backups.

In: a directory of backups and the settings of the central to be. Out: keys in the data directory,
blobs in the blob store, events in the database, whichever they are: a backup of SQLite restores
into PostgreSQL. Guarantees: nothing is written before the whole journal of the backup was replayed
and every blob that it names was found; nothing that is there is overwritten; success is said only
when every blob's digest and the chain in the new database were checked. A restore that was killed
is run again and goes on; central refuses to serve before it is done.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificate

from central import faults
from central.backup.backup import Progress
from central.backup.copying import check_blob, copy_blob
from central.backup.format import (
    BACKUPS,
    BLOBS,
    JOURNAL,
    PKI,
    BackupManifest,
    read_events,
    read_manifest,
)
from central.blobs import BlobStore, DirectoryBlobs, open_blobs
from central.disk import storage, write_file
from central.errors import StorageError
from central.file_lock import DataLock
from central.fleet.pki import identity_of
from central.heads import FILE as HEAD_FILE
from central.heads import keep_head, kept_heads
from central.history import JournalLost, expect_sealed, expect_whole
from central.journal import Event, State, WriterLock, count_events, import_journal, verify_journal
from central.journal.head import Head
from central.journal.lock import SUFFIX as LOCK_SUFFIX
from central.journal.payloads import stored_blobs
from central.journal.stored import replay
from central.settings import CentralSettings
from lorikeet.durable import TEMPORARY_SUFFIX, sync
from protos.manifest import sha256_hex

MARKER = "restore.unfinished"
"""This file is in the data directory while a restore is under way. It names the backup."""


@dataclass(frozen=True)
class Source:
    """A backup that was found whole."""

    path: Path
    manifest: BackupManifest
    state: State
    blobs: BlobStore
    last: Event | None
    """The last event of its journal."""
    release_key_pem: bytes
    """Public part of the key that signed it."""

    @property
    def wanted(self) -> list[str]:
        """Digests of its blobs."""
        return list(stored_blobs(self.state))


def open_backup(directory: Path, name: str | None) -> Source:
    """The newest finished backup, or the one with this name, found whole.

    Its journal is replayed, its keys are checked, and every blob is looked for. Raises StorageError
    naming the event, key or blob that is wrong.
    """
    path = _find(directory, name)
    manifest = read_manifest(path)
    state = State()
    digest = hashlib.sha256()
    with storage(path / JOURNAL), (path / JOURNAL).open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    last: Event | None = None
    for event in read_events(path / JOURNAL):
        replay(state, event)
        last = event
    found = (state.sequence, state.last_hash, digest.hexdigest())
    if found != (manifest.events, manifest.last_hash, manifest.journal_sha256):
        raise StorageError(
            f"{path / JOURNAL} has {found[0]} events, the last with hash {found[1][:12]}; its "
            f"manifest says {manifest.events} and {manifest.last_hash[:12]}. It was cut off or "
            "altered: restore another backup."
        )
    for file, expected in manifest.pki.items():
        with storage(path / PKI / file):
            data = (path / PKI / file).read_bytes()
        if sha256_hex(data) != expected:
            raise StorageError(
                f"{path / PKI / file} was altered: its digest is {sha256_hex(data)}. Restore "
                "another backup."
            )
    with storage(path / PKI):
        release_key_pem = (path / PKI / "release.pub.pem").read_bytes()
    if last is not None:
        expect_sealed(last, release_key_pem)
    blobs = DirectoryBlobs(directory / BLOBS)
    source = Source(path, manifest, state, blobs, last, release_key_pem)
    missing = [blob for blob in source.wanted if blob not in blobs]
    if missing:
        raise StorageError(
            f"{len(missing)} of {len(source.wanted)} blobs of backup {path.name} are missing, the "
            f"first one {missing[0]} at {blobs.where(missing[0])}. Nothing was restored; copy them "
            "there, or restore another backup."
        )
    return source


def check_backup(source: Source, progress: Progress) -> None:
    """Read every blob of the backup; raises StorageError naming the one that was altered."""
    with progress(source.wanted, len(source.wanted)) as shown:
        for blob in shown:
            check_blob(source.blobs, blob)


def restore(
    settings: CentralSettings, source: Source, progress: Progress, accept_loss: bool = False
) -> None:
    """Restore the backup into the data directory, the blob store and the journal of `settings`.

    `accept_loss`: restore even where central is known to have recorded events that the backup
    lacks. Raises StorageError.
    """
    data = settings.data_dir
    with DataLock(data), WriterLock(settings.journal_url):
        target = open_blobs(settings)
        unfinished = _expect_room(settings, source)
        target.expect_owner(_identity(source))
        if not accept_loss:
            _expect_newest(data, target, source)
        if not unfinished:
            write_file(data / MARKER, _mark_of(source))
        faults.reach("restore.begun")
        target.claim(_identity(source))
        target.prepare()
        with progress(source.wanted, len(source.wanted)) as shown:
            for blob in shown:
                if (
                    blob in target
                ):  # of an interrupted restore, or a bucket that outlived its central
                    check_blob(target, blob)
                else:
                    copy_blob(source.blobs, blob, target, data / f"blob{TEMPORARY_SUFFIX}")
                faults.reach("restore.blob")
        for name in source.manifest.pki:
            if not (data / PKI / name).exists():
                (data / PKI).mkdir(mode=0o700, exist_ok=True)
                write_file(data / PKI / name, (source.path / PKI / name).read_bytes())
        faults.reach("restore.keys")
        if count_events(settings.journal_url) == 0:
            import_journal(settings.journal_url, read_events(source.path / JOURNAL))
        faults.reach("restore.journal")
        state = verify_journal(settings.journal_url)
        if state.last_hash != source.manifest.last_hash:
            raise StorageError(
                f"The restored journal ends with hash {state.last_hash}; the backup's manifest "
                f"says {source.manifest.last_hash}. Empty the database and restore again."
            )
        if (last := source.last) is not None:
            keep_head(data, target, Head(sequence=last.sequence, hash=last.hash, seal=last.seal))
        with storage(data):
            (data / f"blob{TEMPORARY_SUFFIX}").unlink(missing_ok=True)
            (data / MARKER).unlink()
            sync(data)


def _expect_newest(data_dir: Path, target: BlobStore, source: Source) -> None:
    """Raises StorageError when a head that is still there names an event that the backup lacks."""
    heads = kept_heads(data_dir, target)
    wanted = {head.sequence for head in heads.values()}
    hashes = (
        {e.sequence: e.hash for e in read_events(source.path / JOURNAL) if e.sequence in wanted}
        if wanted
        else {}
    )
    try:
        expect_whole(heads, hashes.get, source.last, source.release_key_pem)
    except JournalLost as error:
        raise StorageError(
            f"Backup {source.path.name} is older than what central recorded. {error.what} Nothing "
            "was restored. Restore a newer backup; to give the missing events up for good, repeat "
            "with --accept-loss."
        ) from error


def expect_no_unfinished_restore(data_dir: Path) -> None:
    """Raises StorageError while a restore into `data_dir` is unfinished: central must not serve."""
    if (data_dir / MARKER).exists():
        raise StorageError(
            f"A restore into {data_dir} was interrupted. Run the same `central restore` again; it "
            "goes on where it was."
        )


def _find(directory: Path, name: str | None) -> Path:
    backups = directory / BACKUPS
    with storage(backups):
        there = sorted(path.name for path in backups.iterdir()) if backups.is_dir() else []
    finished = [entry for entry in there if not entry.endswith(TEMPORARY_SUFFIX)]
    if name is None and finished:
        return backups / finished[-1]
    if name in finished:
        return backups / str(name)
    half = "; what ends in .tmp was never finished" if len(finished) < len(there) else ""
    raise StorageError(
        f"{directory} has no {'finished backup' if name is None else f'backup {name!r}'}. Its "
        f"backups: {', '.join(there) or 'none'}{half}. Name the directory that `central backup` "
        "wrote to."
    )


def _mark_of(source: Source) -> bytes:
    return (
        json.dumps({"backup": source.path.name, "last_hash": source.manifest.last_hash}) + "\n"
    ).encode()


def _expect_room(settings: CentralSettings, source: Source) -> bool:
    """Refuse to mix two centrals; True when a restore of this backup was begun here."""
    data, marker = settings.data_dir, settings.data_dir / MARKER
    events = count_events(settings.journal_url)
    if marker.exists():
        with storage(marker):
            begun = marker.read_bytes()
        if begun != _mark_of(source):
            raise StorageError(
                f"{data} holds an unfinished restore of another backup "
                f"({begun.decode(errors='replace').strip()}). Finish that one, or empty the "
                "directory and the database."
            )
        return True
    expected = {
        DataLock.NAME,
        HEAD_FILE,
        "lost+found",
        *(() if source.manifest.has_keys else (PKI,)),
    }
    with storage(data):
        strange = sorted(
            p.name
            for p in data.iterdir()
            if p.name not in expected and not p.name.endswith(LOCK_SUFFIX)
        )
    if strange:
        raise StorageError(
            f"{data} is not empty: it holds {', '.join(strange[:5])}. A restore overwrites "
            "nothing; set CENTRAL_DATA_DIR to an empty directory."
        )
    if events:
        raise StorageError(
            f"The database of CENTRAL_JOURNAL__URL is not empty: its journal has {events} events. "
            "A restore overwrites nothing; name an empty database."
        )
    if not source.manifest.has_keys:
        _expect_kept_keys(data / PKI, source)
    return False


def _identity(source: Source) -> str:
    """Identity of the central that was backed up; a bucket that outlived it bears its mark."""
    path = source.path / PKI / "ca.pem"
    try:
        return identity_of(load_pem_x509_certificate(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path} cannot be read as a certificate: {error}. Restore another backup."
        ) from error


def _expect_kept_keys(pki: Path, source: Source) -> None:
    """Refuse a backup without keys where its central's keys are missing."""
    try:
        certificate = load_pem_x509_certificate((source.path / PKI / "ca.pem").read_bytes())
        wanted = {
            "ca.key": certificate.public_key().public_bytes(
                Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
            ),
            "release.key": (source.path / PKI / "release.pub.pem").read_bytes(),
        }
        for name, public in wanted.items():
            key = load_pem_private_key((pki / name).read_bytes(), password=None)
            if (
                key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
                != public
            ):
                raise ValueError(f"{name} is another central's key")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"Backup {source.path.name} was made without keys, and {pki} does not have those of "
            f"its central: {error}. Copy ca.key, server.key, release.key and operator.key there "
            "first, with mode 0600."
        ) from error
