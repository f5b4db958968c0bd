"""What is on disk: every database syncs each commit, and every rename syncs its directory."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from central import disk as central_disk
from central.journal.table import open_database
from edge_node import disk as node_disk
from edge_node.experience import ExperienceStore
from edge_node.learning.records import RoundStore
from edge_node.outbox import Outbox

FULL = 2
"""PRAGMA synchronous: 0 off, 1 normal (WAL: a commit is lost in a power cut), 2 full."""


def sqlite_connections(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    with open_database(f"sqlite:///{tmp_path / 'journal.db'}").connect() as connection:
        yield "central/journal", connection.connection.driver_connection
    yield "edge_node/experience", ExperienceStore(tmp_path / "experience.db")._db
    with Outbox(tmp_path / "outbox", "auto")._transaction() as connection:
        yield "edge_node/outbox", connection
    with RoundStore(tmp_path / "learning").transaction() as connection:
        yield "edge_node/learning", connection


def test_every_database_syncs_each_commit(tmp_path: Path) -> None:
    seen = {}
    for name, connection in sqlite_connections(tmp_path):
        assert isinstance(connection, sqlite3.Connection)
        seen[name] = connection.execute("PRAGMA synchronous").fetchone()[0]
    assert seen == dict.fromkeys(
        ("central/journal", "edge_node/experience", "edge_node/outbox", "edge_node/learning"), FULL
    )


def write_by_central(folder: Path) -> Path:
    central_disk.write_file(folder / "file", b"data")
    return folder / "file"


def write_by_node(folder: Path) -> Path:
    node_disk.write_file(folder / "file", b"data")
    return folder / "file"


def write_by_outbox(folder: Path) -> Path:
    outbox = Outbox(folder, "auto")
    outbox._write_payload("round", b"data")
    return outbox.payload_path("round")


@pytest.mark.parametrize("write", [write_by_central, write_by_node, write_by_outbox])
def test_a_file_is_synced_then_renamed_then_its_directory_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], Path]
) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append(
            "sync directory" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "sync file"
        )
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    assert write(tmp_path).read_bytes() == b"data"
    assert steps == ["sync file", "rename", "sync directory"]
