from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from edge_node.errors import StorageError
from edge_node.outbox import Outbox, OutboxEntry, OutboxState
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex


def make_manifest(
    sequence: int, payload: bytes, *, start: str = "1", round_id: str | None = None
) -> bytes:
    return UpdateManifest(
        node_id="node",
        sequence=sequence,
        base="0" * 64,
        start=Start(release=start * 64, payload="2" * 64, prefix_rank=0, dtype="float32"),
        rank=4,
        payload=Payload(digest_sha256=sha256_hex(payload), size_bytes=len(payload)),
        round_id=round_id or f"r{sequence}",
        experiences=1,
        created_at="2026-11-22T00:00:00Z",
        software="test",
    ).to_bytes()


def add(outbox: Outbox, payload: bytes = b"payload", start: str = "1") -> str:
    sequence = outbox.next_sequence()
    return outbox.add(
        f"r{sequence}", make_manifest(sequence, payload, start=start), b"signature", payload
    )


def test_added_update_is_there_for_another_process(tmp_path: Path) -> None:
    update_id = add(Outbox(tmp_path, "auto"))
    other = Outbox(tmp_path, "auto")
    (entry,) = other.list()
    assert (entry.update_id, entry.sequence, entry.state) == (update_id, 1, OutboxState.WAITING)
    assert other.signed(update_id) == (make_manifest(1, b"payload"), b"signature")
    assert other.payload_path("r1").read_bytes() == b"payload"
    assert other.next_sequence() == 2


def test_same_round_added_again_keeps_the_first_update(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    first = add(outbox)
    again = outbox.add("r1", make_manifest(2, b"other", round_id="r1"), b"signature", b"other")
    assert again == first
    assert len(outbox.list()) == 1
    assert outbox.payload_path("r1").read_bytes() == b"payload"


def test_payload_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    with pytest.raises(ValueError, match="its manifest names payload"):
        outbox.add("r1", make_manifest(1, b"payload"), b"signature", b"another")
    assert not outbox.list()


def test_sequence_of_another_round_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    add(outbox)
    with pytest.raises(ValueError, match="Sequence 1 is taken"):
        outbox.add("r9", make_manifest(1, b"payload", round_id="r9"), b"signature", b"payload")


def test_approval(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "manual")
    first, second = add(outbox), add(outbox, b"second")
    assert [entry.state for entry in outbox.list()] == ["held", "held"]
    assert not outbox.list(OutboxState.WAITING)
    outbox.approve(first)
    outbox.reject(second)
    assert [entry.state for entry in outbox.list()] == ["waiting", "rejected"]
    assert "operator" in outbox.list(OutboxState.REJECTED)[0].reason
    assert not outbox.payload_path("r2").exists()
    with pytest.raises(ValueError, match="is rejected; only an update that is held"):
        outbox.approve(second)
    with pytest.raises(LookupError, match="edge-node outbox list"):
        outbox.approve("f" * 64)


def test_admission_keeps_the_receipt_and_is_only_for_waiting_updates(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "manual")
    update_id = add(outbox)
    with pytest.raises(ValueError, match="is held"):
        outbox.mark_admitted(update_id, b"body", b"signature")
    with pytest.raises(LookupError):
        outbox.receipt(update_id)
    outbox.approve(update_id)
    outbox.mark_admitted(update_id, b"body", b"signature")
    assert outbox.receipt(update_id) == (b"body", b"signature")
    assert not outbox.payload_path("r1").exists()


def test_an_entry_says_what_was_added_and_when_it_changed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "data" / "outbox", "auto")
    update_id = add(outbox)
    outbox.mark_refused(update_id, "NOT_FINITE: nan")
    (entry,) = outbox.list(OutboxState.REFUSED)
    changed_at = entry.changed_at
    assert entry == OutboxEntry(
        sequence=1,
        update_id=update_id,
        round_id="r1",
        start_release="1" * 64,
        state=OutboxState.REFUSED,
        reason="NOT_FINITE: nan",
        created_at="2026-11-22T00:00:00Z",
        changed_at=changed_at,
    )
    assert abs(datetime.now(UTC) - datetime.fromisoformat(changed_at)) < timedelta(minutes=1)
    assert len(changed_at) == len("2026-11-22T00:00:00.000+00:00")


def test_what_an_outbox_of_today_is_on_disk(tmp_path: Path) -> None:
    """Its names and words are read again after an upgrade."""
    outbox = Outbox(tmp_path, "auto")
    for payload in (b"1", b"2", b"3"):
        add(outbox, payload)
    first, second, _ = (entry.update_id for entry in outbox.list())
    outbox.mark_admitted(first, b"body", b"signature")
    outbox.mark_refused(second, "NOT_FINITE: nan")
    held = Outbox(tmp_path, "manual")
    fourth, fifth = add(held, b"4"), add(held, b"5")
    held.reject(fourth, "no")
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as database:
        rows = database.execute("SELECT update_id, state FROM updates ORDER BY sequence").fetchall()
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    words = ["admitted", "refused", "waiting", "rejected", "held"]
    assert [word for _, word in rows] == words
    assert rows[4][0] == fifth
    assert {file.name for file in (tmp_path / "payloads").iterdir()} == {
        "r3.safetensors",
        "r5.safetensors",
    }


def test_what_central_decided_last(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    assert outbox.refused_last() is None
    first, second, third = add(outbox, b"1"), add(outbox, b"2"), add(outbox, b"3")
    outbox.mark_refused(first, "NOT_FINITE: nan")
    last = outbox.refused_last()
    assert last is not None
    assert last.update_id == first
    outbox.mark_admitted(second, b"body", b"signature")
    assert outbox.refused_last() is None, "what came after it was admitted"
    admitted = outbox.last_for_start("1" * 64)
    assert admitted is not None
    assert admitted.update_id == third
    outbox.mark_refused(third, "NOT_FINITE: nan")
    admitted = outbox.last_for_start("1" * 64)
    assert admitted is not None
    assert admitted.update_id == second, "an admitted one counts, a refused one does not"


def test_a_decision_stands_where_the_payload_is_gone_already(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    first, second = add(outbox, b"1"), add(outbox, b"2")
    for round_id in ("r1", "r2"):
        outbox.payload_path(round_id).unlink()
    outbox.mark_admitted(first, b"body", b"signature")
    outbox.mark_refused(second, "NOT_FINITE: nan")
    assert [entry.state for entry in outbox.list()] == ["admitted", "refused"]


def test_last_for_start_is_the_newest_that_central_has_or_gets(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "auto")
    first, refused = add(outbox), add(outbox, b"second")
    other = add(outbox, b"third", start="5")
    outbox.mark_refused(refused, "NOT_FINITE: nan")
    last = outbox.last_for_start("1" * 64)
    assert last is not None
    assert last.update_id == first
    found = outbox.last_for_start("5" * 64)
    assert found is not None
    assert found.update_id == other
    assert outbox.last_for_start("7" * 64) is None


def test_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="EDGE_DATA_DIR"):
        Outbox(tmp_path / "file" / "outbox", "auto")
