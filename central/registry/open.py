"""Which blob store the settings name.

In: CENTRAL_DATA_DIR and CENTRAL_BLOBS__*. Out: the store, not yet asked anything. Raises SettingsError for a URL that is none.
"""

from __future__ import annotations

from pathlib import Path

from central.errors import SettingsError
from central.registry.blobs import BlobStore
from central.registry.directory import DirectoryBlobs
from central.registry.objects import ObjectBlobs
from central.settings import CentralSettings

FILE = "file://"


def open_blobs(settings: CentralSettings) -> BlobStore:
    """`<data_dir>/blobs` unless a URL is set; a path or file:// is a directory too, on a disk of its own if need be."""
    url = settings.blobs.url
    if url and "://" in url and not url.startswith(FILE):
        return ObjectBlobs(url, settings.blobs.options)
    if settings.blobs.options:
        raise SettingsError(
            f"CENTRAL_BLOBS__OPTIONS is set and CENTRAL_BLOBS__URL is {url!r}, a local directory. Expected options for a URL such as "
            "s3://bucket/lorikeet only; unset one of the two."
        )
    return DirectoryBlobs(Path(url.removeprefix(FILE)) if url else settings.data_dir / "blobs")
