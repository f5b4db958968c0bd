"""A store that is not the one the journal means: its volume is not mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from central.blobs import DirectoryBlobs
from central.errors import StorageError


def test_an_empty_place_instead_of_the_store_is_refused_at_start(tmp_path: Path) -> None:
    store = DirectoryBlobs(tmp_path / "blobs")
    store.expect_some({})
    named = {store.put(b"one"): 3, "0" * 64: 1}
    store.expect_some(named)
    empty = DirectoryBlobs(tmp_path / "not-mounted")
    with pytest.raises(
        StorageError,
        match=r"names 2 payloads, and none of the first 2 is beside .*Mount the volume",
    ):
        empty.expect_some(named)
    empty.claim("owner")
    empty.expect_some(named)  # its own place, from which the blobs went
