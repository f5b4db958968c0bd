from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_node.learning.checkpoints import SEAL, newest_valid, seal


def make_checkpoint(workspace: Path, step: int, *, sealed: bool = True) -> Path:
    folder = workspace / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights" * step)
    (folder / "optimizer.pt").write_bytes(b"moments" * step)
    if sealed:
        seal(folder, elapsed_s=step / 10)
    return folder


def test_newest_by_number(tmp_path: Path) -> None:
    for step in (90, 100, 9):
        make_checkpoint(tmp_path, step)
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-100", 10.0)


def cut_short(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"mom")


def altered(folder: Path) -> None:
    (folder / "optimizer.pt").write_bytes(b"Moments" * 20)


def missing(folder: Path) -> None:
    (folder / "optimizer.pt").unlink()


def half_a_seal(folder: Path) -> None:
    (folder / SEAL).write_text('{"files": {')


def no_seal(folder: Path) -> None:
    (folder / SEAL).unlink()


@pytest.mark.parametrize("damage", [cut_short, altered, missing, half_a_seal, no_seal])
def test_damaged_checkpoint_is_skipped_and_deleted(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good, bad = make_checkpoint(tmp_path, 10), make_checkpoint(tmp_path, 20)
    damage(bad)
    assert newest_valid(tmp_path) == (good, 1.0)
    assert not bad.exists()


def test_nothing_valid(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 10, sealed=False)
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None
