"""The blob store: durable, content-addressed, unforgiving."""

from __future__ import annotations

from pathlib import Path

import pytest

from central.errors import StorageError
from central.registry import BlobStore
from protos.manifest import sha256_hex


def test_bytes_come_back_by_their_digest(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"payload")
    assert digest == sha256_hex(b"payload") == blobs.put(b"payload")
    assert (BlobStore(tmp_path).read(digest), blobs.size(digest), digest in blobs) == (b"payload", 7, True)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [digest]


def test_a_finished_file_is_taken_over(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    digest = sha256_hex(b"upload")
    for _ in range(2):
        (tmp_path / "upload").write_bytes(b"upload")
        blobs.put_file(tmp_path / "upload", digest)
        assert not (tmp_path / "upload").exists()
    assert blobs.read(digest) == b"upload"


def test_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    stale = tmp_path / "ab" / "abcd.1234.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    BlobStore(tmp_path)
    assert not stale.exists()


def test_an_altered_or_absent_blob_is_an_error(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"payload")
    blobs.path(digest).write_bytes(b"other")
    with pytest.raises(StorageError, match="was altered"):
        blobs.read(digest)
    with pytest.raises(StorageError, match="is not at"):
        blobs.read("0" * 64)
    with pytest.raises(StorageError, match="cannot be used"):
        BlobStore(blobs.path(digest))
