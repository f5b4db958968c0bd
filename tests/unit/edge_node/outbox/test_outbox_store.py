from __future__ import annotations

from pathlib import Path

import pytest

from edge_node.errors import StorageError
from edge_node.outbox import Outbox, OutboxState
from protos.manifest import Payload, Start, UpdateManifest, sha256_hex


def make_manifest(sequence: int, payload: bytes, *, start: str = "1", round_id: str | None = None) -> bytes:
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
    return outbox.add(f"r{sequence}", make_manifest(sequence, payload, start=start), b"signature", payload)


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
