"""Payloads by their SHA-256: what every blob store promises.

In: bytes, or a finished local file. Out: the same bytes, whole or in ranges. Guarantees: what `put`
or `put_file` returned for is durable; a blob never changes, and a half-written one is never seen
under its digest; `read` checks the digest. `DirectoryBlobs` (directory.py) keeps them on a disk,
`ObjectBlobs` (objects.py) behind an fsspec URL.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path

from central.errors import StorageError
from protos.manifest import sha256_hex

OWNER = "owner"
"""Name of the note at the top of a store that says whose it is. Notes are no blobs."""
LOOKED_FOR = 100
"""So many of the journal's blobs are looked for in a store without a mark."""


class BlobLost(StorageError):
    """A blob is absent, altered or unreadable while the store answers; to read it again is no use.

    The whole store may still be at fault, for example a volume that is not mounted. Then its other
    blobs are lost too.
    """


def is_digest(name: str) -> bool:
    """Whether a file of this name is a blob."""
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


class BlobStore(ABC):
    """A place for blobs, for several threads.

    Every method blocks, and raises StorageError when the store cannot be used.
    """

    @abstractmethod
    def put(self, data: bytes) -> str:
        """Keep `data`; returns its digest. Idempotent."""

    @abstractmethod
    def put_file(self, file: Path, digest: str) -> None:
        """Keep what is in `file`. Idempotent.

        The caller has checked its digest, and never changes the file again.
        """

    @abstractmethod
    def read_range(self, digest: str, start: int, end: int) -> bytes:
        """The bytes [start, end) of a blob, without a check of its digest.

        They must lie inside the whole blob. Raises BlobLost when it is absent, unreadable or too
        short.
        """

    @abstractmethod
    def size(self, digest: str) -> int:
        """Size in bytes; raises StorageError when it is absent."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Remove a blob; idempotent."""

    @abstractmethod
    def where(self, digest: str) -> str:
        """Where the blob lies or would lie, for messages."""

    @abstractmethod
    def __contains__(self, digest: object) -> bool: ...

    @abstractmethod
    def _read(self, digest: str) -> bytes:
        """All bytes; raises BlobLost when it is absent or unreadable."""

    @abstractmethod
    def digests(self) -> Iterator[str]:
        """Every blob in the store, from one listing; call it seldom."""

    @abstractmethod
    def read_note(self, name: str) -> bytes | None:
        """A small file at the top of the store; None when there is none."""

    @abstractmethod
    def write_note(self, name: str, data: bytes) -> None:
        """Write or replace a note, whole and durable."""

    @abstractmethod
    def note_where(self, name: str) -> str:
        """Where a note lies or would lie, for messages."""

    def claim(self, owner: str) -> None:
        """Mark the store as that of `owner` (Pki.identity), before anything else is written.

        Raises StorageError when the store is another central's. Some stores have no conditional
        write, so two centrals that claim at the same moment may both succeed. The later mark stays,
        and the other central is refused at its next start.
        """
        if self.owner() is None:
            self.write_note(OWNER, f"{owner}\n".encode())
        self.expect_owner(owner)

    def expect_owner(self, owner: str) -> None:
        """Raises StorageError when the store is marked as another central's; writes nothing."""
        if (found := self.owner()) not in (owner, None):
            raise StorageError(
                f"The blobs beside {self.note_where(OWNER)} are those of another central: the mark "
                f"says {(found or 'nothing')[:12]!r}, this one is {owner[:12]!r}. Two that share a "
                "store delete each other's payloads. Set CENTRAL_BLOBS__URL to a place of this "
                "central's own. To hand the store over, stop the other central for good and "
                f"remove {self.note_where(OWNER)}; remove `head` beside it too, if it is there; "
                "this one marks it at its next start."
            )

    def owner(self) -> str | None:
        """The central that the store is marked with; None without a mark."""
        note = self.read_note(OWNER)
        return None if note is None else note.decode(errors="replace").strip()

    def expect_some(self, digests: Collection[str]) -> None:
        """Raises StorageError when the store is another place than before. Call it before `claim`.

        Such a store has neither a mark nor any of the first blobs that the journal names. Every
        update would seem lost.
        """
        first = list(islice(digests, LOOKED_FOR))
        if first and self.owner() is None and not any(digest in self for digest in first):
            raise StorageError(
                f"The journal names {len(digests)} payloads, and none of the first {len(first)} is "
                f"beside {self.note_where(OWNER)}. Mount the volume, set CENTRAL_BLOBS__URL to the "
                "place they lie in, or restore them from a backup."
            )

    def read(self, digest: str) -> bytes:
        """The bytes of a blob; raises BlobLost when it is absent or was altered."""
        data = self._read(digest)
        if (found := sha256_hex(data)) != digest:
            raise self.altered(digest, found)
        return data

    def holds(self, digest: str) -> bool:
        """Read the blob; whether it is whole. Raises StorageError when the store is away."""
        try:
            self.read(digest)
        except BlobLost:
            return False
        return True

    def prepare(self) -> None:
        """Write, read and delete a small blob, before central serves. Raises StorageError."""
        digest = self.put(b"probe " + secrets.token_bytes(16))
        self.read(digest)
        self.delete(digest)
        if digest in self:
            raise StorageError(
                f"{self.where(digest)} was deleted and is still there. Expected a store that "
                "deletes."
            )

    def absent(self, digest: str) -> BlobLost:
        """What to raise for a blob that is not there."""
        return BlobLost(
            f"Blob {digest} is not at {self.where(digest)}. Restore the blobs from a backup."
        )

    def unreadable(self, digest: str, cause: str) -> BlobLost:
        """What to raise for a blob that the store has and does not give."""
        return BlobLost(
            f"Blob {self.where(digest)} cannot be read: {cause}. Mend its permissions or its disk, "
            "or restore it from a backup."
        )

    def short(self, digest: str, size: int, expected: int) -> BlobLost:
        """What to raise for a blob that ends before byte `expected`."""
        return BlobLost(
            f"Blob {self.where(digest)} was cut off: it has {size} bytes; expected at least "
            f"{expected}. Restore it from a backup."
        )

    def altered(self, digest: str, found: str) -> BlobLost:
        """What to raise for a blob whose bytes have the digest `found`."""
        return BlobLost(
            f"Blob {self.where(digest)} was altered: its digest is {found}. Restore it from a "
            "backup."
        )
