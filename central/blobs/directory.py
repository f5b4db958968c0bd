"""Blobs in a local directory: the default.

Blobs lie at `<root>/<first two digits>/<digest>`. Durable means fsync, rename, fsync of the
directory. Without `prepare` nothing is made or cleared up, so that a reader may stand beside the
central that writes. A damaged blob is replaced when its bytes come again.
"""

from __future__ import annotations

import errno
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from central import faults
from central.blobs.store import BlobStore, is_digest
from central.disk import make_directory, storage, write_file
from lorikeet.durable import (
    TEMPORARY_SUFFIX,
    publish,
    publish_link,
    remove_temporary_files,
    sync,
)
from protos.manifest import sha256_hex

_OF_ONE_FILE = (
    errno.EACCES,
    errno.EBADMSG,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EUCLEAN,
)
"""Errors that stay with a file however often it is read.

Other errors pass: too many open files, a network disk that is away.
"""


class DirectoryBlobs(BlobStore):
    """One directory, made when the first blob comes."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def root(self) -> Path:
        """Where the blobs lie."""
        return self._root

    def prepare(self) -> None:
        """Remove what a killed process left unfinished, and try the directory."""
        make_directory(self._root)
        with storage(self._root):
            remove_temporary_files(self._root)
            # All of them now: a thread must not rely on a folder that another one has made and not
            # synced yet.
            for number in range(256):
                make_directory(self._root / f"{number:02x}")
            sync(self._root)
        super().prepare()

    def put(self, data: bytes) -> str:
        digest = sha256_hex(data)
        path = self._place(digest)
        if not self._is_kept(path, digest, len(data)):
            write_file(path, data)
        return digest

    def put_file(self, file: Path, digest: str) -> None:
        path = self._place(digest)
        with storage(file):
            sync(file)
            faults.reach("blob.written")
            damaged = path.exists() and not self._is_kept(path, digest, file.stat().st_size)
            if damaged or not publish_link(file, path):  # no link takes the place of what is there
                self._copy(file, path)
            faults.reach("blob.published")

    def read_range(self, digest: str, start: int, end: int) -> bytes:
        with self._readable(digest) as path, path.open("rb") as stream:
            stream.seek(start)
            data = stream.read(end - start)
        if len(data) < end - start:
            raise self.short(digest, self.size(digest), end)
        return data

    def size(self, digest: str) -> int:
        path = self.path(digest)
        with storage(path):
            return path.stat().st_size

    def delete(self, digest: str) -> None:
        path = self._at(digest)
        with storage(path):
            path.unlink(missing_ok=True)

    def where(self, digest: str) -> str:
        return str(self._at(digest))

    def path(self, digest: str) -> Path:
        """Where the blob lies; raises BlobLost when it is absent or out of reach."""
        path = self._at(digest)
        try:
            if path.is_file():
                return path
        except OSError as error:
            raise self.unreadable(digest, error.strerror or str(error)) from error
        raise self.absent(digest)

    def __contains__(self, digest: object) -> bool:
        return self._at(str(digest)).is_file()

    def _read(self, digest: str) -> bytes:
        with self._readable(digest) as path:
            return path.read_bytes()

    @contextmanager
    def _readable(self, digest: str) -> Iterator[Path]:
        """The blob's path while the block reads it; an error of this one file is a BlobLost."""
        path = self.path(digest)
        with storage(path):
            try:
                yield path
            except OSError as error:
                if error.errno in _OF_ONE_FILE:
                    raise self.unreadable(digest, error.strerror or str(error)) from error
                raise

    def digests(self) -> Iterator[str]:
        with storage(self._root):
            for path in self._root.glob("??/*"):
                if is_digest(path.name):
                    yield path.name

    def read_note(self, name: str) -> bytes | None:
        path = self._root / name
        with storage(path):
            return path.read_bytes() if path.is_file() else None

    def write_note(self, name: str, data: bytes) -> None:
        make_directory(self._root)
        write_file(self._root / name, data)

    def note_where(self, name: str) -> str:
        return str(self._root / name)

    def _copy(self, file: Path, path: Path) -> None:
        copy = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        with storage(path):
            try:
                shutil.copyfile(file, copy)
                copy.chmod(0o600)
                sync(copy)
                publish(copy, path)
            except BaseException:
                copy.unlink(missing_ok=True)
                raise

    def _is_kept(self, path: Path, digest: str, size: int) -> bool:
        """Whether the blob at `path` is whole.

        Its bytes are read only when its size is right, because the same bytes rarely come twice.
        """
        with storage(path):
            return path.is_file() and path.stat().st_size == size and self.holds(digest)

    def _at(self, digest: str) -> Path:
        return self._root / digest[:2] / digest

    def _place(self, digest: str) -> Path:
        folder = self._root / digest[:2]
        if not folder.is_dir():
            make_directory(folder)
            with storage(folder):
                sync(self._root)
        return folder / digest
