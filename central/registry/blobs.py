"""Payloads by their SHA-256.

In: bytes, or a finished file. Out: the same bytes. Guarantees: what `put` or `put_file` returned for is durable; a blob
never changes; `read` checks the digest. Blobs lie at `<root>/<first two digits>/<digest>`.
"""

from __future__ import annotations

from pathlib import Path

from central import faults
from central.durable import (
    make_directory,
    publish,
    remove_temporary_files,
    storage,
    sync_directory,
    sync_file,
    write_file,
)
from central.errors import StorageError
from protos.manifest import sha256_hex


class BlobStore:
    """A directory; several threads may use it."""

    def __init__(self, root: Path) -> None:
        """Create `root` when absent and remove what a killed process left unfinished; raises StorageError."""
        self._root = root
        make_directory(root)
        with storage(root):
            remove_temporary_files(root)

    def put(self, data: bytes) -> str:
        """Keep `data`; returns its digest. Idempotent."""
        digest = sha256_hex(data)
        path = self._place(digest)
        if not path.is_file():
            write_file(path, data)
        return digest

    def put_file(self, temporary: Path, digest: str) -> None:
        """Take over the finished file `temporary` (same file system), whose digest the caller has checked. Idempotent."""
        path = self._place(digest)
        with storage(temporary):
            sync_file(temporary)
            faults.reach("blob.written")
            publish(temporary, path)
            faults.reach("blob.published")

    def read(self, digest: str) -> bytes:
        """The bytes of a blob; raises StorageError when it is absent or was altered."""
        path = self.path(digest)
        with storage(path):
            data = path.read_bytes()
        if sha256_hex(data) != digest:
            raise StorageError(f"Blob {path} was altered: its digest is {sha256_hex(data)}. Restore it from a backup.")
        return data

    def path(self, digest: str) -> Path:
        """Where the blob lies; raises StorageError when it is absent."""
        path = self._root / digest[:2] / digest
        if not path.is_file():
            raise StorageError(f"Blob {digest} is not at {path}. Restore the blob directory from a backup.")
        return path

    def size(self, digest: str) -> int:
        """Size in bytes; raises StorageError when it is absent."""
        return self.path(digest).stat().st_size

    def __contains__(self, digest: str) -> bool:
        return (self._root / digest[:2] / digest).is_file()

    def _place(self, digest: str) -> Path:
        folder = self._root / digest[:2]
        if not folder.is_dir():
            make_directory(folder)
            with storage(folder):
                sync_directory(self._root)
        return folder / digest
