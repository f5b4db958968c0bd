"""The rooms on disk: central's stores, opened in the order that keeps an unfinished past from harm.

In: CentralSettings. Out: Rooms. The cast:

    DataLock        one central per data directory; WriterLock: one per journal, wherever it is
    Journal         the only truth (journal/); Heads: where it ends (heads.py)
    Pki             keys and certificates (fleet/)
    BlobStore       payloads (blobs/); Registry: releases and channels (releases/)
    Uploads         updates on their way (intake/)
    Collector       deletes payloads that nothing needs (retention/); Space: room for uploads

Guarantee: what a kill left is recovered or refused here, before anybody is served.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from central.backup.restore import expect_no_unfinished_restore
from central.blobs import BlobStore, DirectoryBlobs, open_blobs
from central.disk import make_directory, storage
from central.errors import SettingsError, StorageError
from central.file_lock import DataLock
from central.fleet.pki import Pki
from central.heads import FILE as HEAD_FILE
from central.heads import Heads, kept_heads
from central.history import expect_begun, expect_history, unnamed_blobs
from central.intake.uploads import Uploads
from central.journal import Journal, WriterLock, count_events
from central.journal.payloads import stored_blobs
from central.releases import Registry
from central.retention.collector import Collector
from central.settings import CentralSettings
from central.space import Space
from protos.base import BaseModelError, BaseModelInfo, read_base_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rooms:
    """Everything that lives on disk, opened."""

    base: BaseModelInfo
    journal: Journal
    pki: Pki
    blobs: BlobStore
    registry: Registry
    uploads: Uploads
    collector: Collector
    heads: Heads
    space: Space


def open_rooms(settings: CentralSettings, stack: ExitStack) -> Rooms:
    """Open everything on disk, recovering what a kill left; `stack` closes it again. Blocks."""
    stack.enter_context(DataLock(settings.data_dir))
    expect_no_unfinished_restore(settings.data_dir)
    base = _read_base(settings)
    blobs = open_blobs(settings)
    space = Space(_places(settings, blobs), settings.limits.reserve_bytes)
    space.expect_possible()
    space.release_ballast()  # what is written at start may find the disk full
    stack.enter_context(WriterLock(settings.journal_url))
    kept = kept_heads(settings.data_dir, blobs)
    served_before = (settings.data_dir / HEAD_FILE).exists() or count_events(
        settings.journal_url
    ) > 0
    names = [*settings.listen.names, *_listen_name(settings.listen.host)]
    pki = Pki.load_or_create(settings.data_dir, names, served_before)
    is_ours = (
        blobs.owner() == pki.identity
    )  # what lies in a store that is handed over is no sign of a lost journal
    blobs.expect_owner(pki.identity)
    uploads = Uploads(settings.data_dir / "uploads", settings.limits.node_unfinished)
    if is_ours:
        expect_begun(settings.journal_url, kept, settings.data_dir, blobs)
    heads = Heads(settings.data_dir, blobs, pki.release_key)
    journal = Journal(settings.journal_url, seals=heads)
    stack.callback(journal.close)
    expect_history(journal, kept, settings.data_dir, blobs, pki.release_key_pem)
    pki.keep_public_parts(settings.data_dir)
    with journal.read() as state:
        blobs.expect_some(stored_blobs(state))
    blobs.claim(pki.identity)
    heads.start(journal)
    stack.callback(_copy_head, heads)
    blobs.prepare()  # a kill may leave its probe: from here on that is no sign of a lost journal
    _expect_same_base(journal, base)
    _expect_same_cohorts(journal, settings)
    registry = Registry(journal, blobs, pki.release_key, base.digest, settings.builds_on)
    with journal.read() as state:
        # A kill may have come between an update's admission and this.
        uploads.discard_all(
            {u.update_id for u in state.updates.values() if not state.updates.may_come_again(u)}
        )
    collector = Collector(journal, blobs, uploads, settings.retention, space=space)
    collector.recover()
    _report_unnamed(journal, blobs)
    space.take_ballast()
    if text := space.shortage():
        log.warning("no upload is taken", extra={"reason": text})
    return Rooms(base, journal, pki, blobs, registry, uploads, collector, heads, space)


def _copy_head(heads: Heads) -> None:
    """Done at the stop; the next start does it again."""
    try:
        heads.copy()
    except StorageError as error:
        log.error("the journal's head is not copied", extra={"detail": str(error)})


def _report_unnamed(journal: Journal, blobs: BlobStore) -> None:
    with journal.read() as state:
        found = unnamed_blobs(state, blobs)
    if found:  # an upload that was interrupted leaves one, and names it when the node goes on
        log.warning(
            "blobs that no event names",
            extra={"blobs": len(found), "list": "central journal verify"},
        )


def _places(settings: CentralSettings, blobs: BlobStore) -> list[Path]:
    """The directories that central writes to, one on each disk."""
    journal = sa.make_url(settings.journal_url)
    places = [settings.data_dir]
    if journal.get_backend_name() == "sqlite" and journal.database:
        places.append(Path(journal.database).parent)
    if isinstance(blobs, DirectoryBlobs):
        places.append(blobs.root)
    found: dict[int, Path] = {}
    for place in places:
        make_directory(place)
        with storage(place):
            found.setdefault(place.stat().st_dev, place)
    return list(found.values())


def _read_base(settings: CentralSettings) -> BaseModelInfo:
    if settings.base.path is None:
        raise SettingsError(
            "CENTRAL_BASE__PATH is not set. Set it to the Hugging Face directory of the base "
            "model that the nodes serve."
        )
    try:
        return read_base_model(settings.base.path, memory=settings.data_dir)
    except BaseModelError as error:
        raise SettingsError(f"CENTRAL_BASE__PATH is not usable. {error}") from error


def _expect_same_base(journal: Journal, base: BaseModelInfo) -> None:
    with journal.read() as state:
        known = next(
            (state.genesis(cohort).manifest.base for cohort in state.cohorts()), base.digest
        )
    if known != base.digest:
        raise SettingsError(
            f"The base model at {base.path} has digest {base.digest}; the releases in "
            f"CENTRAL_DATA_DIR are for {known}. "
            "Point CENTRAL_BASE__PATH at that base model, or CENTRAL_DATA_DIR at a new directory."
        )


def _expect_same_cohorts(journal: Journal, settings: CentralSettings) -> None:
    with journal.read() as state:
        for cohort, wanted in settings.cohorts.builds_on.items():
            made = state.builds_on.get(cohort, "none")
            if cohort in state.cohorts() and wanted != made:
                raise SettingsError(
                    f"CENTRAL_COHORTS__BUILDS_ON says that cohort {cohort!r} builds on {wanted}; "
                    f"it was made to build on {made}, and "
                    "its releases do. Set it back, or make a cohort of another name and enrol the "
                    "nodes there."
                )


def _listen_name(host: str) -> list[str]:
    return [] if host in ("0.0.0.0", "::") else [host]
