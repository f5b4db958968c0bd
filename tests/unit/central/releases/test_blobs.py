"""What only the directory of blobs has; tests/contract/test_blob_stores.py is of every store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from central.blobs import DirectoryBlobs
from central.errors import StorageError
from protos.manifest import sha256_hex


def test_nothing_else_is_left(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    blobs.prepare()
    digest = blobs.put(b"payload")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [digest]


def test_every_folder_is_made_before_the_first_blob(tmp_path: Path) -> None:
    """A thread may rely on a folder that it finds: no power cut takes away another thread's."""
    DirectoryBlobs(tmp_path).prepare()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        f"{number:02x}" for number in range(256)
    }


def test_what_a_kill_left_is_removed_by_the_writer_alone(tmp_path: Path) -> None:
    stale = tmp_path / "ab" / "abcd.1234.tmp"
    stale.parent.mkdir()
    stale.write_bytes(b"half")
    assert "0" * 64 not in DirectoryBlobs(tmp_path)
    assert stale.exists()
    DirectoryBlobs(tmp_path).prepare()
    assert not stale.exists()


def test_a_file_from_another_disk_is_copied(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one file system")
    blobs = DirectoryBlobs(tmp_path)
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        upload = Path(folder) / "upload"
        upload.write_bytes(b"payload")
        blobs.put_file(upload, sha256_hex(b"payload"))
    assert blobs.read(sha256_hex(b"payload")) == b"payload"


def test_a_place_that_is_no_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be used"):
        DirectoryBlobs(tmp_path / "file").prepare()
