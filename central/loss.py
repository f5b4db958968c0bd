"""`central journal accept-loss`: an operator lets central go on without events that it recorded.

In: settings; no central runs. Out: what is missing, and with `apply` an event about it and new
heads. Guarantees: without `apply` nothing is written; a journal that was rewritten, whose last
event is not signed by central, is never accepted.
"""

from __future__ import annotations

from central.backup.restore import expect_no_unfinished_restore
from central.blobs import open_blobs
from central.errors import StorageError
from central.file_lock import DataLock
from central.fleet.pki import Pki
from central.heads import Heads, kept_heads
from central.history import JournalLost, expect_begun, expect_sealed, last_event, verify_history
from central.journal import EventKind, Journal, NewEvent, WriterLock, count_events
from central.settings import CentralSettings


def accept_loss(settings: CentralSettings, apply: bool) -> str:
    """What is missing of the journal, in words; empty when nothing is. Raises StorageError."""
    with DataLock(settings.data_dir), WriterLock(settings.journal_url):
        expect_no_unfinished_restore(settings.data_dir)
        loss = _find(settings)
        if loss is not None and apply:
            _accept(settings, loss)
        return loss.what if loss else ""


def _find(settings: CentralSettings) -> JournalLost | None:
    store, url = open_blobs(settings), settings.journal_url
    heads = kept_heads(settings.data_dir, store)
    try:
        expect_begun(url, heads, settings.data_dir, store)
        if heads or count_events(url):
            verify_history(settings.data_dir, url, store)
            return None
    except JournalLost as error:
        return error
    raise StorageError(
        f"No central ran in {settings.data_dir} yet: it has no journal and no head. Set "
        "CENTRAL_DATA_DIR to the directory that central serves from."
    )


def _accept(settings: CentralSettings, loss: JournalLost) -> None:
    store = open_blobs(settings)
    pki = Pki.load_or_create(settings.data_dir, settings.listen.names, served_before=True)
    store.claim(pki.identity)
    heads = Heads(settings.data_dir, store, pki.release_key)
    journal = Journal(settings.journal_url, seals=heads)
    try:
        if (last := last_event(journal)) is not None:
            expect_sealed(last, pki.release_key_pem)
        head = loss.head
        body = {
            "sequence": head.sequence if head else 0,
            "hash": head.hash if head else "",
            "by": "operator",
        }
        journal.append(NewEvent(EventKind.JOURNAL_LOSS_ACCEPTED, body=body))
        heads.start(journal)
    finally:
        journal.close()
