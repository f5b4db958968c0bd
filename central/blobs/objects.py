"""Blobs behind an fsspec URL, such as S3, Google Cloud Storage or Azure.

Blobs lie at `<URL>/<first two digits>/<digest>`. An object store makes an object visible when all
of it is there; on any other backend a blob is written under another name and moved. Durable is what
the backend calls stored. Credentials are the backend's own: its environment variables, files or the
machine's role.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from central import faults
from central.blobs.store import BlobStore, is_digest
from central.disk import storage
from central.errors import SettingsError, StorageError
from lorikeet.durable import TEMPORARY_SUFFIX
from protos.manifest import sha256_hex

WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
"""Protocols whose objects appear whole or not at all."""
PART_BYTES = 8 << 20
"""An upload to S3 holds at most a few parts in memory."""


class ObjectBlobs(BlobStore):
    """One prefix of one bucket; it belongs to one central alone."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        """Make the client, without a call to the store.

        Raises SettingsError for a URL that fsspec does not know. Raises StorageError when the
        backend's package is missing or refuses the options.
        """
        import fsspec  # only a central with such a URL needs it

        protocol, separator, rest = url.partition("://")
        if not separator or not rest.strip("/") or "::" in url or not _is_known(protocol):
            raise SettingsError(
                f"CENTRAL_BLOBS__URL is {url!r}. Expected a path, file:///path, or one fsspec URL "
                "with a bucket or folder, for example s3://bucket/lorikeet."
            )
        self._shown = re.sub(
            "//[^/@]*@", "//", url.rstrip("/")
        )  # user and password stay out of messages
        self._is_whole = protocol in WHOLE_OBJECTS
        self._put_options: dict[str, Any] = (
            {"chunksize": PART_BYTES} if protocol in ("s3", "s3a") else {}
        )
        with self._asking():
            # No listing is believed that is older than the question.
            fixed = {"use_listings_cache": False, "skip_instance_cache": True}
            filesystem, self._root = fsspec.core.url_to_fs(url.rstrip("/"), **{**options, **fixed})
        self._files: Any = filesystem

    def put(self, data: bytes) -> str:
        digest = sha256_hex(data)
        if self._size(digest) != len(data) or not self.holds(digest):
            self._write(self._key(digest), lambda key: self._files.pipe_file(key, data))
        return digest

    def put_file(self, file: Path, digest: str) -> None:
        with storage(file):
            size = file.stat().st_size
        faults.reach("blob.written")
        if self._size(digest) != size or not self.holds(digest):
            self._write(
                self._key(digest),
                lambda key: self._files.put_file(str(file), key, **self._put_options),
            )
            if (kept := self._size(digest)) != size:
                raise StorageError(
                    f"{self.where(digest)} has {kept} bytes after {size} were written. Expected "
                    "all of them; check the store."
                )
        faults.reach("blob.published")

    def read_range(self, digest: str, start: int, end: int) -> bytes:
        with self._asking():
            try:
                data = bytes(self._files.cat_file(self._key(digest), start=start, end=end))
            except FileNotFoundError as error:
                raise self.absent(digest) from error
            except OSError as error:  # S3 refuses a range of which it has no byte
                if (size := self.size(digest)) < end:
                    raise self.short(digest, size, end) from error
                raise
        if len(data) < end - start:
            raise self.short(digest, self.size(digest), end)
        return data

    def size(self, digest: str) -> int:
        size = self._size(digest)
        if size is None:
            raise self.absent(digest)
        return size

    def delete(self, digest: str) -> None:
        if self._size(digest) is not None:
            with self._asking():
                self._files.rm_file(self._key(digest))

    def where(self, digest: str) -> str:
        return f"{self._shown}/{digest[:2]}/{digest}"

    def __contains__(self, digest: object) -> bool:
        return self._size(str(digest)) is not None

    def _read(self, digest: str) -> bytes:
        with self._asking():
            try:
                return bytes(self._files.cat_file(self._key(digest)))
            except FileNotFoundError as error:
                raise self.absent(digest) from error
            except (
                PermissionError
            ) as error:  # also what S3 says of an absent object to who may not list the bucket
                raise self.unreadable(digest, f"the store forbids it ({error})") from error

    def digests(self) -> Iterator[str]:
        with self._asking():
            try:
                names = [key.rpartition("/")[2] for key in self._files.find(self._root)]
            except FileNotFoundError:  # nothing was ever put there
                names = []
        return filter(is_digest, names)

    def read_note(self, name: str) -> bytes | None:
        with self._asking():
            try:
                return bytes(self._files.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def write_note(self, name: str, data: bytes) -> None:
        self._write(f"{self._root}/{name}", lambda key: self._files.pipe_file(key, data))

    def note_where(self, name: str) -> str:
        return f"{self._shown}/{name}"

    def _key(self, digest: str) -> str:
        return f"{self._root}/{digest[:2]}/{digest}"

    def _size(self, digest: str) -> int | None:
        with self._asking():
            try:  # not fs.exists: it takes every error for absence
                return int(self._files.info(self._key(digest))["size"])
            except FileNotFoundError:
                return None

    def _write(self, key: str, write: Any) -> None:
        with self._asking():
            if self._is_whole:
                write(key)
                return
            self._files.makedirs(key.rpartition("/")[0], exist_ok=True)
            temporary = f"{key}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
            write(temporary)
            self._files.mv(temporary, key)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (
            Exception
        ) as error:  # a backend raises what it likes: botocore's errors are no OSError
            cause = (str(error).splitlines() or [""])[0]
            raise StorageError(
                f"The blobs at {self._shown} cannot be used: {type(error).__name__}: {cause}. "
                "Check CENTRAL_BLOBS__URL, CENTRAL_BLOBS__OPTIONS and the credentials in central's "
                "environment; S3 needs the package s3fs."
            ) from error


def _is_known(protocol: str) -> bool:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:  # known, and its package is missing
        return True
    except ValueError:
        return False
    return True
