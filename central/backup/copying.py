"""Copies blobs between stores, and checks them.

In: two stores. Out: the same bytes under the same digest. Guarantee: what arrives was read whole
and has its digest; memory holds one range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from central.blobs import BlobStore
from central.disk import storage

RANGE_BYTES = 4 << 20


def copy_blob(source: BlobStore, digest: str, target: BlobStore, scratch: Path) -> None:
    """Copy one blob through the file `scratch`; raises StorageError when it is lost or altered."""
    found = hashlib.sha256()
    with storage(scratch):
        scratch.unlink(missing_ok=True)  # after a kill it may be a blob by another name
    with storage(scratch), scratch.open("xb") as stream:
        scratch.chmod(0o600)
        for data in _ranges(source, digest):
            found.update(data)
            stream.write(data)
    if found.hexdigest() == digest:
        target.put_file(scratch, digest)
    with storage(scratch):
        scratch.unlink()
    if found.hexdigest() != digest:
        raise source.altered(digest, found.hexdigest())


def check_blob(store: BlobStore, digest: str) -> None:
    """Read one blob; raises StorageError when it is absent or was altered."""
    found = hashlib.sha256()
    for data in _ranges(store, digest):
        found.update(data)
    if found.hexdigest() != digest:
        raise store.altered(digest, found.hexdigest())


def _ranges(store: BlobStore, digest: str) -> Iterator[bytes]:
    size = store.size(digest)
    for begin in range(0, size, RANGE_BYTES):
        yield store.read_range(digest, begin, min(begin + RANGE_BYTES, size))
