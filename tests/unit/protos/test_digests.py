"""Digests are remembered for files that did not change, and for no others."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from protos import digests
from protos.digests import Digests


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each file that was read whole."""
    real, found = hashlib.file_digest, []

    def counting(stream: Any, name: str) -> Any:
        found.append(1)
        return real(stream, name)

    monkeypatch.setattr(digests.hashlib, "file_digest", counting)
    return found


def later() -> float:
    return time.time() + 60


def digest_of(file: Path, memory: Path | None, clock: Any = later) -> str:
    known = Digests(memory, clock)
    digest = known.of(file)
    known.save()
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    return digest


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    return file


def test_an_unchanged_file_is_read_once(tmp_path: Path, weights: Path, read: list[int]) -> None:
    for _ in range(3):
        digest_of(weights, tmp_path / "memory.json")
    assert len(read) == 1
    assert (tmp_path / "memory.json").stat().st_mode & 0o777 == 0o600


def test_a_file_that_was_just_written_is_read_again(
    tmp_path: Path, weights: Path, read: list[int]
) -> None:
    for _ in range(2):
        digest_of(
            weights, tmp_path / "memory.json", time.time
        )  # another write may leave the same times
    assert len(read) == 2


@pytest.mark.parametrize("change", ["in place", "replaced", "times set back"])
def test_a_changed_file_is_read_again(tmp_path: Path, weights: Path, change: str) -> None:
    memory = tmp_path / "memory.json"
    digest_of(weights, memory)
    status = weights.stat()
    if change == "in place":
        weights.write_bytes(b"other")
    elif change == "replaced":
        (tmp_path / "new").write_bytes(b"other")
        os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        (tmp_path / "new").replace(weights)
    else:
        weights.write_bytes(b"other")
        os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest_of(weights, memory) == hashlib.sha256(b"other").hexdigest()


def test_a_link_is_known_by_the_file_it_leads_to(tmp_path: Path, weights: Path) -> None:
    link, other = tmp_path / "link.safetensors", tmp_path / "other"
    other.write_bytes(b"other")
    link.symlink_to(weights)
    first = digest_of(link, tmp_path / "memory.json")
    link.unlink()
    link.symlink_to(other)
    assert digest_of(link, tmp_path / "memory.json") != first


WRONG = "0" * 64


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '"x"', "[" * 5000, '{"PATH": 3}', '{"PATH": [1, 2]}',
                                     '{"PATH": [[], null]}', '{"PATH": [[1], []]}'],
)  # fmt: skip
def test_a_damaged_memory_costs_only_time(tmp_path: Path, weights: Path, content: str) -> None:
    memory = tmp_path / "memory.json"
    memory.write_text(content.replace("PATH", str(weights.resolve())))
    memory.chmod(0o600)
    digest_of(weights, memory)


def forged(memory: Path, weights: Path) -> None:
    status = weights.stat()
    times = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    memory.write_text(json.dumps({str(weights.resolve()): [times, WRONG]}))


def test_a_memory_that_others_may_write_is_not_believed(tmp_path: Path, weights: Path) -> None:
    memory = tmp_path / "memory.json"
    forged(memory, weights)
    memory.chmod(0o600)
    assert Digests(memory, later).of(weights) == WRONG  # the test's own forgery is a good one
    memory.chmod(0o666)
    digest_of(weights, memory)
    memory.unlink()
    forged(tmp_path / "elsewhere.json", weights)
    (tmp_path / "elsewhere.json").chmod(0o600)
    memory.symlink_to(tmp_path / "elsewhere.json")
    digest_of(weights, memory)


def test_a_memory_that_cannot_be_written_is_done_without(tmp_path: Path, weights: Path) -> None:
    digest_of(weights, tmp_path / "absent" / "memory.json")
    digest_of(weights, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]


def test_two_programs_remember_in_one_file(tmp_path: Path, weights: Path, read: list[int]) -> None:
    other = tmp_path / "second.safetensors"
    other.write_bytes(b"second")
    memory = tmp_path / "memory.json"
    one, two = Digests(memory, later), Digests(memory, later)
    one.of(weights), two.of(other)
    one.save(), two.save()
    digest_of(weights, memory), digest_of(other, memory)
    assert len(read) == 2
