"""Which blob store the settings name.

In: CENTRAL_DATA_DIR and CENTRAL_BLOBS__*. Out: the store, not yet asked anything. Raises
SettingsError for a URL that is none.
"""

from __future__ import annotations

from pathlib import Path

from central.blobs.directory import DirectoryBlobs
from central.blobs.objects import ObjectBlobs
from central.blobs.store import BlobStore
from central.errors import SettingsError
from central.settings import CentralSettings

FILE = "file://"


def open_blobs(settings: CentralSettings) -> BlobStore:
    """The store at the URL of `settings`, or `<data_dir>/blobs` when no URL is set.

    A path or a file:// URL is a directory too; it may lie on another disk.
    """
    url = settings.blobs.url
    if url and "://" in url and not url.startswith(FILE):
        return ObjectBlobs(url, settings.blobs.options)
    if settings.blobs.options:
        raise SettingsError(
            f"CENTRAL_BLOBS__OPTIONS is set and CENTRAL_BLOBS__URL is {url!r}, a local directory. "
            "Expected options for a URL such as s3://bucket/lorikeet only; unset one of the two."
        )
    return DirectoryBlobs(Path(url.removeprefix(FILE)) if url else settings.data_dir / "blobs")
