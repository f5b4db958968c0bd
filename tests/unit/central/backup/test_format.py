"""Lines of a backup's journal that nobody wrote are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from central.backup.format import read_events
from central.errors import StorageError

EVENT = {
    "sequence": 1, "at": "2026-11-22T12:00:00Z", "kind": "token_created", "cohort": "shared",
    "subject": "t", "body": {},
    "previous_hash": "0" * 64, "hash": "1" * 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"body": 5},
        {"body": [1]},
        {"body": {"uses": float("nan")}},
        {"body": {"uses": "\ud800"}},
        {"kind": 5},
        {"sequence": None},
        {"more": 1},
    ],
)
def test_an_event_that_is_none_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps({**EVENT, **changed}) + "\n")
    with pytest.raises(StorageError, match="was altered"):
        list(read_events(path))


@pytest.mark.parametrize("line", [b"[]", b"5", b"\xff\xfe", b"[" * 100_000, b"{"])
def test_a_line_that_is_no_event_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(StorageError, match="line 1 is no event"):
        list(read_events(path))
