"""Checkpoints that can be trusted after a crash.

In: a directory that the trainer has just written. Out: the newest directory whose every file is as
it was sealed. A kill or a power cut can leave half of a checkpoint; the seal is written last and
names each file's digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from edge_node.disk import read_json

SEAL = "sealed.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def seal(checkpoint: Path, elapsed_s: float) -> None:
    """Mark `checkpoint` as whole; `elapsed_s` is the round's training time so far.

    Nothing is forced to disk: the digests show a checkpoint that a power cut tore. The one before
    it, or the round's beginning, gives the same result a little later. A kill loses nothing.
    """
    digests = {file.name: _digest(file) for file in checkpoint.iterdir() if file.is_file()}
    partial = checkpoint.with_name(f"{checkpoint.name}.{SEAL}")
    partial.write_text(json.dumps({"files": digests, "elapsed_s": elapsed_s}))
    partial.replace(checkpoint / SEAL)


def newest_valid(workspace: Path) -> tuple[Path, float] | None:
    """The newest valid checkpoint and its elapsed seconds; every other one is deleted."""
    found = sorted(
        (folder for folder in workspace.glob("checkpoint-*") if _NAME.fullmatch(folder.name)),
        key=lambda folder: int(folder.name.rpartition("-")[2]),
        reverse=True,
    )
    newest: tuple[Path, float] | None = None
    for folder in found:
        elapsed_s = _read(folder) if newest is None else None
        if elapsed_s is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            newest = folder, elapsed_s
    return newest


def _read(checkpoint: Path) -> float | None:
    try:
        document = read_json(checkpoint / SEAL)
        whole = all(
            _digest(checkpoint / name) == digest for name, digest in document["files"].items()
        )
        return float(document["elapsed_s"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
