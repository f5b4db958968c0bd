"""Backups: the journal, every blob that it names, and the keys, as files of one portable format.

In: a central's settings and a directory; central may run or not. Out: `<directory>/backups/<time>/`
with

    manifest.json   what the backup holds; written last
    journal.jsonl   every event as one line of canonical JSON, whatever database it came from
    pki/            certificates, and the private keys unless they were left out; files of mode 0600

and the blobs at `<directory>/blobs/<first two digits>/<digest>`, which all backups in one directory
share: a repeated backup copies only what is new. Guarantees: a backup is a prefix of the journal
with all that it names, consistent in itself; every blob's digest is checked while it is copied; a
backup has its name only when all of it is on disk, and what a kill left is removed by the next.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from central import __version__, faults
from central.backup.copying import copy_blob
from central.backup.format import BACKUPS, BLOBS, JOURNAL, MANIFEST, PKI, BackupManifest, event_line
from central.blobs import BlobStore, DirectoryBlobs, open_blobs
from central.disk import make_directory, storage, write_file
from central.errors import StorageError
from central.file_lock import FileLock
from central.history import verify_history
from central.journal import Event, State, utc_now
from central.journal.payloads import stored_blobs
from central.settings import CentralSettings
from lorikeet.durable import TEMPORARY_SUFFIX, publish
from protos.manifest import sha256_hex

ATTEMPTS = 5
"""A running central may collect blobs while they are copied; then the journal is read again."""
Progress = Callable[[Iterable[str], int], AbstractContextManager[Iterable[str]]]
"""Shows progress: takes the digests and how many there are, gives the same digests."""


@dataclass(frozen=True)
class Backup:
    """What was written."""

    path: Path
    manifest: BackupManifest
    copied: int
    """Blobs that the directory did not have from earlier backups."""


def back_up(
    settings: CentralSettings, directory: Path, with_keys: bool, progress: Progress
) -> Backup:
    """Write one backup. Raises StorageError and then leaves the earlier backups as they were."""
    _expect_usable(settings, directory)
    taken = (
        f"Another backup is being written to {directory}. Wait for it, or name another directory."
    )
    with FileLock(directory / "backup.lock", taken):
        blobs = DirectoryBlobs(directory / BLOBS)
        blobs.prepare()
        work = _new_work(directory / BACKUPS)
        copied = _copy(settings, work, blobs, progress)
        names = _copy_keys(settings.data_dir / PKI, work / PKI, with_keys)
        state, digest = copied.state, copied.journal_sha256
        stored = stored_blobs(state)
        base = next((state.genesis(cohort).manifest.base for cohort in state.cohorts()), "")
        manifest = BackupManifest(
            created_at=utc_now(),
            software=f"lorikeet {__version__}",
            base=base,
            events=state.sequence,
            last_hash=state.last_hash,
            journal_sha256=digest,
            blobs=len(stored),
            blob_bytes=sum(blobs.size(blob) for blob in stored),
            pki=names,
            has_keys=with_keys,
        )
        write_file(work / MANIFEST, manifest.to_bytes())
        faults.reach("backup.complete")
        path = work.with_name(work.name.removesuffix(TEMPORARY_SUFFIX))
        with storage(path):
            publish(work, path)
        return Backup(path, manifest, copied.copied)


@dataclass(frozen=True)
class _Copied:
    state: State
    journal_sha256: str
    copied: int


def _copy(settings: CentralSettings, work: Path, target: BlobStore, progress: Progress) -> _Copied:
    source, copied = open_blobs(settings), 0
    missing: set[str] = set()
    for _ in range(ATTEMPTS):
        state, digest = _export(settings, source, work / JOURNAL)
        faults.reach("backup.journal")
        wanted = stored_blobs(state)
        if lost := sorted(missing & wanted.keys()):
            raise source.absent(lost[0])
        new = [blob for blob in wanted if blob not in target]
        missing = set()
        with progress(new, len(new)) as shown:
            for blob in shown:
                try:
                    copy_blob(source, blob, target, work / f"blob{TEMPORARY_SUFFIX}")
                except StorageError:
                    if blob in source:
                        raise
                    missing.add(
                        blob
                    )  # collected since the journal was read, or lost: the journal knows
                    continue
                copied += 1
                faults.reach("backup.blob")
        if not missing:
            return _Copied(state, digest, copied)
    raise StorageError(
        f"Blobs went away during each of {ATTEMPTS} attempts, the last one {min(missing)}. Try "
        "again when `central retention` is done."
    )


def _export(settings: CentralSettings, store: BlobStore, path: Path) -> tuple[State, str]:
    """Write the journal as it is now; returns its state and the file's SHA-256.

    Raises StorageError for a journal that is not whole.
    """
    digest = hashlib.sha256()
    with storage(path), path.open("wb") as stream:

        def write(event: Event) -> None:
            line = event_line(event)
            digest.update(line)
            stream.write(line)

        state = verify_history(settings.data_dir, settings.journal_url, store, also=write)
        stream.flush()
        os.fsync(stream.fileno())
    return state, digest.hexdigest()


def _copy_keys(source: Path, target: Path, with_keys: bool) -> dict[str, str]:
    """SHA-256 by file name of what was copied; raises StorageError when there is nothing."""
    names = (
        sorted(path.name for path in source.glob("*") if path.suffix in (".key", ".pem"))
        if source.is_dir()
        else []
    )
    if not {"ca.key", "release.key"} <= set(names):
        raise StorageError(
            f"{source} has no ca.key and release.key. Expected the keys of the central whose "
            "journal this is; set CENTRAL_DATA_DIR to the directory that central serves from."
        )
    make_directory(target)
    found: dict[str, str] = {}
    for name in names:
        if with_keys or not name.endswith(".key"):
            with storage(source / name):
                data = (source / name).read_bytes()
            write_file(target / name, data)
            found[name] = sha256_hex(data)
    return found


def _expect_usable(settings: CentralSettings, directory: Path) -> None:
    place, data = directory.absolute(), settings.data_dir.absolute()
    if place == data or place.is_relative_to(data / "blobs") or data.is_relative_to(place):
        raise StorageError(
            f"A backup cannot lie in {directory}, where central's data is. Name a directory on "
            "another disk."
        )
    with storage(directory):
        strange = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else []
    strange = [
        name for name in strange if name not in (BLOBS, BACKUPS, "backup.lock", "lost+found")
    ]
    if strange:
        raise StorageError(
            f"{directory} holds {', '.join(strange[:5])}. Expected an empty or new directory, or "
            "one with earlier backups."
        )


def _new_work(backups: Path) -> Path:
    """Make an empty directory for the backup; remove what a kill left of an earlier one."""
    make_directory(backups)
    with storage(backups):
        for stale in backups.glob(f"*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(stale)
        name = next(name for name in _names() if not (backups / name).exists())
        work = backups / f"{name}{TEMPORARY_SUFFIX}"
        work.mkdir(mode=0o700)
    return work


def _names() -> Iterator[str]:
    """By time, so that the last in order is the newest."""
    while True:
        yield datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
