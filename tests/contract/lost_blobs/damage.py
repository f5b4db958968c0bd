"""Ways to damage or lose a blob, and what the journal says of an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.contract.cohort_loop import Central, make_increment

NODES = ("a-1", "b-2", "c-3", "d-4", "e-5")


def admit(central: Central, count: int = 3) -> list[str]:
    return [
        central.admit(node, make_increment(number)) for number, node in enumerate(NODES[:count])
    ]


def record(central: Central, update_id: str) -> Any:
    with central.journal.read() as state:
        return state.updates[update_id]


def blob_of(central: Central, update_id: str) -> Path:
    return central.blobs.path(record(central, update_id).manifest.payload.digest_sha256)


def version(central: Central) -> int:
    return central.head().manifest.version


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def swap(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "flipped": flip,
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
    "swapped": swap,
    "a directory": lambda path, other: (path.unlink(), path.mkdir()),
}


def release_blob(central: Central) -> Path:
    return central.blobs.path(central.head().manifest.payload.digest_sha256)
